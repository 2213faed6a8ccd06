"""Old events become events of today, one step after the other."""

from __future__ import annotations

import re

import pytest
from google.protobuf.message import DecodeError

from bank.legacy.v1.person_pb2 import PersonAdded, PersonEnrolled
from bank.v1.person_pb2 import PersonRegistered
from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.upcasting import NONE, Step, Upcasters

ADDED, ENROLLED, REGISTERED = "bank.legacy.v1.PersonAdded", "bank.legacy.v1.PersonEnrolled", "bank.v1.PersonRegistered"


def enrolled(old: PersonAdded) -> PersonEnrolled:
    """The name alone."""
    return PersonEnrolled(person_id=old.person_id, last_name=old.last_and_first_name)


def registered(old: PersonEnrolled) -> PersonRegistered:
    """The name alone."""
    return PersonRegistered(person_id=old.person_id, name=old.last_name)


STEPS = (Step(PersonEnrolled, PersonRegistered, registered), Step(PersonAdded, PersonEnrolled, enrolled))
UPCASTERS = Upcasters(*STEPS)
OLD = PersonAdded(person_id="p", last_and_first_name="Alice").SerializeToString()
NEW = PersonRegistered(person_id="p", name="Alice").SerializeToString()


def test_a_chain_ends_with_the_message_of_today() -> None:
    """From wherever it begins; what is of today already is not touched, whatever its bytes are."""
    middle = PersonEnrolled(person_id="p", last_name="Alice").SerializeToString()
    assert UPCASTERS.upcast(ADDED, OLD) == UPCASTERS.upcast(ENROLLED, middle) == (REGISTERED, NEW)
    assert UPCASTERS.upcast(REGISTERED, b"\xff") == (REGISTERED, b"\xff")
    assert [UPCASTERS.newest(name) for name in (ADDED, ENROLLED, REGISTERED)] == [REGISTERED] * 3
    assert UPCASTERS.stored_as([REGISTERED, "other"]) == [ADDED, ENROLLED, REGISTERED, "other"]
    assert UPCASTERS.stored_as([ENROLLED]) == [ENROLLED]
    assert (ADDED in UPCASTERS, REGISTERED in UPCASTERS, ADDED in NONE) == (True, False, False)


def test_envelopes_are_replaced_and_only_the_old_ones() -> None:
    """Type and payload change, the rest stays; bytes that cannot be read stay, for whoever decodes them to refuse."""
    envelopes = [EventEnvelope(position=1, version=7, type=ADDED, payload=OLD), EventEnvelope(type=REGISTERED, payload=b"x")]
    broken = EventEnvelope(type=ADDED, payload=b"\xff\xff")
    UPCASTERS.update([*envelopes, broken])
    assert envelopes[0] == EventEnvelope(position=1, version=7, type=REGISTERED, payload=NEW)
    assert envelopes[1].payload == b"x"
    assert (broken.type, broken.payload) == (ADDED, b"\xff\xff")
    with pytest.raises(DecodeError):
        UPCASTERS.upcast(ADDED, b"\xff\xff")


def test_two_steps_from_one_message_and_circles_are_refused() -> None:
    """When the table is made, not when an event comes."""
    with pytest.raises(TypeError, match="two steps begin with the same message"):
        Upcasters(*STEPS, Step(PersonAdded, PersonRegistered, lambda old: PersonRegistered()))
    with pytest.raises(TypeError, match=re.escape("lead back to it")):
        Upcasters(*STEPS, Step(PersonRegistered, PersonAdded, lambda old: PersonAdded()))
