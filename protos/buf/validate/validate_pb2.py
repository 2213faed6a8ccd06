"""The message classes of `buf/validate/validate.proto`, which generated modules import for their field rules.

protovalidate 2 carries the definition only for another protobuf runtime, which takes half a second to import. So the same
descriptor is kept in a file beside this one, which `make proto` writes and its check compares: the rules and the validator
that reads them are always of one version.
"""

from pathlib import Path

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    field_mask_pb2,
    timestamp_pb2,
)
from google.protobuf.internal import builder

# The definition imports these four: they must be in the pool before it.
_IMPORTED = (descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2)

DESCRIPTOR = descriptor_pool.Default().AddSerializedFile(Path(__file__).with_name("validate.binpb").read_bytes())
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, "buf.validate.validate_pb2", globals())
