// What the subscriber keeps, in one JSON file: its place on the line, the effects of its handler, and the events it gave up on.
//
// The file is replaced as a whole (written beside it, flushed, renamed), so effects and place change together: each event takes
// effect exactly once. Killed anywhere, the file is as before or as after. A second subscriber on the same file is refused
// by a lock, which names the process; the lock of one that was killed is taken over.

import { closeSync, existsSync, fsyncSync, openSync, readFileSync, renameSync, rmSync, writeSync } from "node:fs";
import { dirname } from "node:path";

// Another subscriber uses the file.
export class InUse extends Error {}

export class Inbox {
  constructor(path) {
    this.path = path;
    this.lock = `${path}.lock`;
    takeLock(this.lock);
    this.state = existsSync(path)
      ? JSON.parse(readFileSync(path, "utf8"))
      : { place: { epoch: "", position: "0", eventId: "" }, totals: {}, deadLetters: {} };
  }

  // The last event that was handled.
  get place() {
    const { epoch, position, eventId } = this.state.place;
    return { epoch, position: BigInt(position), eventId };
  }

  // The positions of the events that were given up.
  get deadLetters() {
    return Object.keys(this.state.deadLetters).map(BigInt);
  }

  // Forgets all effects and dead letters: the events behind this place are handled again.
  beginAnew({ epoch, position, eventId }) {
    this.#save({ place: { epoch, position: String(position), eventId }, totals: {}, deadLetters: {} });
  }

  // Lets the handler take the event and moves the place. Throws what the handler throws; then nothing has changed.
  handle(epoch, event, handler) {
    const next = structuredClone(this.state);
    handler(next, event);
    this.#save({ ...next, place: placeOf(epoch, event) });
  }

  // Moves on without an effect; the event is a dead letter until it is replayed.
  giveUp(epoch, event, error) {
    const deadLetters = { ...this.state.deadLetters, [event.position]: { type: event.type, error: String(error) } };
    this.#save({ ...this.state, deadLetters, place: placeOf(epoch, event) });
  }

  // Lets the handler take a dead letter, which then is none. Throws what the handler throws; then it stays one.
  replay(event, handler) {
    if (!(event.position in this.state.deadLetters)) return;
    const next = structuredClone(this.state);
    delete next.deadLetters[event.position];
    handler(next, event);
    this.#save(next);
  }

  close() {
    rmSync(this.lock, { force: true });
  }

  #save(next) {
    const fresh = `${this.path}.new`;
    const file = openSync(fresh, "w", 0o600);
    writeSync(file, JSON.stringify(next));
    fsyncSync(file);
    closeSync(file);
    renameSync(fresh, this.path);
    const folder = openSync(dirname(this.path), "r");
    fsyncSync(folder);
    closeSync(folder);
    this.state = next;
  }
}

function placeOf(epoch, event) {
  return { epoch, position: String(event.position), eventId: event.eventId };
}

function takeLock(path) {
  for (;;) {
    try {
      const file = openSync(path, "wx", 0o600);
      writeSync(file, String(process.pid));
      closeSync(file);
      return;
    } catch (error) {
      if (error.code !== "EEXIST") throw error;
    }
    const holder = Number(readFileSync(path, "utf8"));
    if (holder !== process.pid && isAlive(holder)) throw new InUse(`process ${holder} uses this file`);
    rmSync(path, { force: true });
  }
}

function isAlive(pid) {
  try {
    process.kill(pid, 0);
    return pid > 0;
  } catch (error) {
    return error.code === "EPERM";
  }
}
