"""The message classes of `buf/validate/validate.proto`, which generated modules import for their field rules.

protovalidate 2 carries the definition only for another protobuf runtime; this module loads that same descriptor
into the one used here, so the rules and the validator that reads them are always of one version.
"""

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    field_mask_pb2,
    timestamp_pb2,
)
from google.protobuf.internal import builder
from protovalidate._gen.buf.validate import validate_pb

# The definition imports these four: they must be in the pool before it.
_IMPORTED = (descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2)

DESCRIPTOR = descriptor_pool.Default().AddSerializedFile(validate_pb.desc().proto.to_binary())
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, "buf.validate.validate_pb2", globals())
