// The messages of Foldline's contracts, from their descriptors (protos/baseline.binpb): no code is generated.

import { readFileSync } from "node:fs";
import protobuf from "protobufjs";
import "protobufjs/ext/descriptor.js";

export class Contracts {
  constructor(file) {
    this.root = protobuf.Root.fromDescriptor(readFileSync(file));
  }

  encode(type, fields) {
    const found = this.root.lookupType(type);
    return Buffer.from(found.encode(found.fromObject(fields)).finish());
  }

  // The fields of a message. Whole numbers of 64 bits are text, because a JavaScript number would round them.
  decode(type, bytes) {
    const found = this.root.lookupType(type);
    return found.toObject(found.decode(bytes), { longs: String, defaults: true });
  }
}
