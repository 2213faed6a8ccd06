// The events of a shard in order, each once: from JetStream as they come, from the event store whatever JetStream lacks.
//
// JetStream tells quickly; the event store (foldline.v1.EventStoreService/ReadAll, role `reader`) decides. The sequence of a
// message in the stream is the event's position on the line, so a gap is seen at once and filled from the store.

import { setTimeout as sleep } from "node:timers/promises";
import grpc from "@grpc/grpc-js";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect, nanos } from "@nats-io/transport-node";

const READ_ALL = "/foldline.v1.EventStoreService/ReadAll";
const FETCH_MAX = 200;
// After so long without a message the store is read: the broker may have lost something, or be away.
const SILENCE_MS = 1000;
const WAIT_FOR = new Set([grpc.status.UNAVAILABLE, grpc.status.DEADLINE_EXCEEDED]);

// The store does not hold the event that was handled last: it was restored to an older state.
export class HistoryDiverged extends Error {}

// There is no event at that position yet.
export class LineEnds extends Error {}

export class Line {
  constructor({ contracts, write, nats, token, shard = 1 }) {
    this.contracts = contracts;
    this.nats = nats;
    this.shard = shard;
    this.client = new grpc.Client(write, grpc.credentials.createInsecure());
    this.metadata = new grpc.Metadata();
    this.metadata.set("authorization", `Bearer ${token}`);
  }

  // Every event behind a place, without end, each with the epoch of its history. Throws HistoryDiverged.
  async *after(place) {
    for (;;) {
      for await (const found of this.#stored(place)) {
        yield found;
        place = { epoch: found.epoch, position: found.event.position, eventId: found.event.eventId };
      }
      try {
        for await (const event of this.#told(place)) {
          yield { epoch: place.epoch, event };
          place = { epoch: place.epoch, position: event.position, eventId: event.eventId };
        }
      } catch (error) {
        // The broker is away, the stream is gone, or somebody else published into it: the store has what is missing.
        if (this.said !== error.message) console.error(`without JetStream: ${(this.said = error.message)}`);
      }
      await sleep(50);
    }
  }

  // The event at a position. Throws LineEnds.
  async one(position) {
    return (await this.#one(position)).event;
  }

  // The place from which the event at a position is the next. Throws LineEnds.
  async before(position) {
    if (position === 1n) return { epoch: "", position: 0n, eventId: "" };
    const { epoch, event } = await this.#one(position - 1n);
    return { epoch, position: event.position, eventId: event.eventId };
  }

  async #one(position) {
    for await (const answer of this.#readAll({ shard: this.shard, fromPosition: String(position), eventsMax: 1 })) {
      if (answer.events.length) return { epoch: answer.epoch, event: eventOf(answer.events[0]) };
    }
    throw new LineEnds(`the line ends before ${position}`);
  }

  close() {
    this.client.close();
  }

  async *#readAll(request) {
    const call = this.client.makeServerStreamRequest(
      READ_ALL,
      (fields) => this.contracts.encode("foldline.v1.ReadAllRequest", fields),
      (bytes) => this.contracts.decode("foldline.v1.ReadAllResponse", bytes),
      request,
      this.metadata,
      { deadline: Date.now() + 60_000 },
    );
    try {
      yield* call;
    } finally {
      call.cancel();
    }
  }

  // What the store has behind the place; waits while it does not answer. Reads the place's own event as a proof.
  async *#stored(place) {
    for (;;) {
      const from = place.position > 1n ? place.position : 1n;
      try {
        for await (const answer of this.#readAll({ shard: this.shard, fromPosition: String(from) })) {
          if (BigInt(answer.headPosition) < place.position) {
            throw new HistoryDiverged(`the line ends at ${answer.headPosition}, ${place.position} was handled`);
          }
          for (const event of answer.events.map(eventOf)) {
            if (event.position === place.position && event.eventId !== place.eventId) {
              throw new HistoryDiverged(`position ${event.position} is another event than the one that was handled`);
            }
            if (event.position === place.position + 1n) {
              yield { epoch: answer.epoch, event };
              place = { epoch: answer.epoch, position: event.position, eventId: event.eventId };
            }
          }
        }
        return;
      } catch (error) {
        if (!WAIT_FOR.has(error.code)) throw error;
        await sleep(500);
      }
    }
  }

  // What JetStream delivers directly behind a place, until something is missing or the broker is away.
  async *#told(place) {
    // The client takes no credentials from a URL.
    const { host, username, password } = new URL(this.nats);
    const [user, pass] = [username, password].map(decodeURIComponent);
    const client = await connect({ servers: host, user, pass, reconnect: false, timeout: 2000 });
    try {
      const stream = `FOLDLINE_EVENTS_${this.shard}`;
      const manager = await jetstreamManager(client, { timeout: 2000 });
      const { config } = await manager.streams.info(stream);
      if (config.metadata?.["foldline-epoch"] !== place.epoch) return;
      // The consumer lives no longer than this connection, and acknowledges nothing: the place is in the subscriber's own file,
      // where it changes with the effects. A durable consumer would keep a second one in the broker, which is lost with it.
      const { name } = await manager.consumers.add(stream, {
        deliver_policy: "by_start_sequence",
        opt_start_seq: Number(place.position + 1n),
        ack_policy: "none",
        inactive_threshold: nanos(30_000),
        mem_storage: true,
      });
      const consumer = await jetstream(client).consumers.get(stream, name);
      let position = place.position;
      for (;;) {
        let came = false;
        for await (const message of await consumer.fetch({ max_messages: FETCH_MAX, expires: SILENCE_MS })) {
          const event = fromMessage(message);
          came = true;
          if (event.position <= position) continue;
          if (event.position > position + 1n) return;
          yield event;
          position = event.position;
        }
        if (!came) return;
      }
    } finally {
      await client.close();
    }
  }
}

function eventOf(envelope) {
  return {
    position: BigInt(envelope.position),
    eventId: envelope.eventId,
    tenant: envelope.tenant,
    aggregateType: envelope.aggregateType,
    aggregateId: envelope.aggregateId,
    version: BigInt(envelope.version),
    type: envelope.type,
    payload: envelope.payload,
  };
}

// The event in a message: CloudEvents 1.0 in binary mode, values percent-encoded.
function fromMessage(message) {
  const header = (name) => decodeURIComponent(message.headers.get(name));
  const [, , , tenant, aggregateType] = message.headers.get("ce-source").split("/");
  return {
    position: BigInt(message.seq),
    eventId: header("ce-id"),
    tenant: decodeURIComponent(tenant),
    aggregateType: decodeURIComponent(aggregateType),
    aggregateId: header("ce-subject"),
    version: BigInt(header("Foldline-Version")),
    type: header("ce-type"),
    payload: message.data,
  };
}
