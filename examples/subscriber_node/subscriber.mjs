// Keeps the totals of all deposits: `node subscriber.mjs follow` and, for dead letters, `... replay`.

import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { Contracts } from "./contracts.mjs";
import { InUse, Inbox } from "./inbox.mjs";
import { HistoryDiverged, Line, LineEnds } from "./line.mjs";

const TRIES = 3;
const PAUSE_MS = 200;
const DEPOSITED = "bank.v1.MoneyDeposited";

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    write: { type: "string" },
    nats: { type: "string" },
    token: { type: "string" },
    file: { type: "string", default: "subscriber.json" },
    shard: { type: "string", default: "1" },
    from: { type: "string" },
    contracts: { type: "string", default: fileURLToPath(new URL("../../protos/baseline.binpb", import.meta.url)) },
  },
});
const [action] = positionals;
const rightStart = values.from === undefined || (action === "follow" && /^[1-9][0-9]*$/.test(values.from));
if (!["follow", "replay"].includes(action) || !values.write || !values.nats || !values.token || !rightStart) {
  console.error("node subscriber.mjs follow|replay --write HOST:PORT --nats URL --token TOKEN [--file FILE] [--shard N]");
  console.error("with follow also --from POSITION: forget the totals, and handle the events from this position on anew");
  process.exit(2);
}

const contracts = new Contracts(values.contracts);
const line = new Line({ ...values, contracts, shard: Number(values.shard) });
let inbox;

// The handler: what this subscriber makes of an event. It changes `state` alone, and ignores unknown types.
function addDeposit(state, event) {
  if (event.type !== DEPOSITED) return;
  const deposit = contracts.decode(DEPOSITED, event.payload);
  const key = JSON.stringify([event.tenant, deposit.currency]);
  const before = state.totals[key] ?? { deposits: 0, amountMinor: "0" };
  state.totals[key] = {
    deposits: before.deposits + 1,
    amountMinor: String(BigInt(before.amountMinor) + BigInt(deposit.amountMinor)),
  };
}

// Handles every event of the line, in order, without end.
async function follow() {
  for await (const { epoch, event } of line.after(inbox.place)) {
    for (let attempt = 1; attempt <= TRIES; attempt++) {
      try {
        inbox.handle(epoch, event, addDeposit);
        break;
      } catch (error) {
        console.error(`position ${event.position}, try ${attempt}: ${error}`);
        if (attempt === TRIES) inbox.giveUp(epoch, event, error);
        else await sleep(PAUSE_MS * 2 ** attempt);
      }
    }
  }
}

// Handles the dead letters anew; returns how many are left.
async function replay() {
  for (const position of inbox.deadLetters) {
    try {
      inbox.replay(await line.one(position), addDeposit);
    } catch (error) {
      console.error(`position ${position}: ${error}`);
    }
  }
  return inbox.deadLetters.length;
}

try {
  inbox = new Inbox(values.file);
  if (values.from !== undefined) inbox.beginAnew(await line.before(BigInt(values.from)));
  process.exitCode = action === "replay" ? Number((await replay()) > 0) : await follow();
} catch (error) {
  if (![HistoryDiverged, InUse, LineEnds].some((kind) => error instanceof kind)) throw error;
  console.error(`stopped: ${error.message}`);
  process.exitCode = 3;
} finally {
  inbox?.close();
  line.close();
}
