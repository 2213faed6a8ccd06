"""Which fields of what is shown a caller wants: google.protobuf.FieldMask as `read_mask` of Get and List RPCs."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.field_mask_pb2 import FieldMask

from shared.rpc.bounds import rules_broken

PATHS_MAX = 64
"""More than any summary has fields."""


def mask_of(request: Any, shown: Descriptor | None) -> FieldMask | None:
    """The request's mask; None if all fields are wanted.

    Raises Invalid (INVALID_REQUEST) for a path that `shown` does not have.
    """
    if not request.HasField("read_mask") or not request.read_mask.paths:
        return None
    mask: Any = request.read_mask
    assert shown is not None  # it is a message
    if len(mask.paths) > PATHS_MAX:
        raise rules_broken(("read_mask", f"must have at most {PATHS_MAX} paths"))
    for path in mask.paths:
        if not FieldMask(paths=[path]).IsValidForDescriptor(shown):
            raise rules_broken(("read_mask", f"has a path that {shown.name} does not have: {path[:100]}"))
    return mask  # type: ignore[no-any-return]


def only(mask: FieldMask | None, message: Any) -> Any:
    """The message with no other fields than the mask's."""
    if mask is None:
        return message
    kept = type(message)()
    mask.MergeMessage(message, kept)
    return kept
