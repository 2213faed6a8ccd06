"""A fourth process, of another domain, through the real runner: failure at each step, and what makes up for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from foldline.v1 import command_pb2
from saga_service.registry import PROCESSES
from shared.folds.errors import Refusal, Rejected, Unavailable
from shared.folds.ids import step_id
from shared.processes.process_type import process_types
from shared.rpc.status import to_status
from tests.support.domains.gifts import TENANT, World
from tests.support.domains.order_process import ORDER, REQUESTS, Placed
from tests.support.fakes.line import uid
from tests.support.system.waiting import eventually


@dataclass
class Shop:
    """Carries out the commands of orders, each id once, in the order in which they come; refuses a step if told to."""

    refuses: str = ""
    # How often each command is answered with "not now" before it is taken.
    away: int = 0
    done: list[tuple[str, str]] = field(default_factory=list)
    answers: dict[str, Refusal | None] = field(default_factory=dict)

    async def send_batch(self, request: command_pb2.SendBatchRequest, *, timeout: float, metadata: Any) -> Any:  # noqa: ASYNC109
        """`CommandServiceStub.SendBatch`."""
        return command_pb2.SendBatchResponse(receipts=[self._carry_out(item) for item in request.items])

    def _carry_out(self, item: command_pb2.BatchItem) -> command_pb2.CommandReceipt:
        name = item.command.type_url.rpartition("/")[2]
        [(step, kind)] = [(step, kind) for step, kind in REQUESTS.items() if kind.DESCRIPTOR.full_name == name]
        command: Any = kind.FromString(item.command.value)
        id_ = command.options.command_id
        assert id_ == str(step_id("order", command.order_id, step))
        assert command.amount == 100
        receipt = command_pb2.CommandReceipt(command_id=id_, status=command_pb2.COMMAND_STATUS_COMPLETED)
        if self.away:
            self.away -= 1
            refusal: Refusal | None = Unavailable("DATABASE_UNAVAILABLE", "away")
        elif id_ in self.answers:
            refusal = self.answers[id_]
        else:
            refusal = self.answers[id_] = Rejected("REFUSED", "told to") if step == self.refuses else None
            if refusal is None:
                self.done.append((command.order_id, step))
        if refusal is not None:
            receipt.status = command_pb2.COMMAND_STATUS_REJECTED
            receipt.error.CopyFrom(to_status(refusal))
        return receipt


# (the step that is refused, what is carried out)
ROADS = {
    "": ["reserve", "pay", "ship", "confirm"],
    "reserve": ["cancel"],
    "pay": ["reserve", "release", "cancel"],
    "ship": ["reserve", "pay", "refund", "release", "cancel"],
}


async def play(world: World, shop: Shop, orders: Sequence[int]) -> None:
    """Places orders, and waits until each has ended."""
    for number in orders:
        world.store.append(TENANT, uid(number), Placed(order_id=uid(number), amount=100), category="order")
    write: Any = shop
    async with world.running(world.runner(write=write, manager=ORDER)):

        async def ended() -> bool:
            return await world.statuses() == {"ended": len(orders)}

        await eventually(ended, 30)


@pytest.mark.parametrize("refused", ROADS, ids=lambda step: step or "nothing")
async def test_what_was_done_is_undone_in_reverse_order(world: World, refused: str) -> None:
    """Each step once, also when most tries find nobody there; then what makes up for those that were done."""
    shop = Shop(refuses=refused, away=3)
    await play(world, shop, range(1, 6))
    for number in range(1, 6):
        assert [step for order_id, step in shop.done if order_id == uid(number)] == ROADS[refused]
    rows = await world.query("SELECT phase, state FROM processes")
    assert {phase for phase, _ in rows} == {"cancelled" if refused else "confirmed"}
    assert {orjson.loads(state)["reason"] for _, state in rows} == {"REFUSED" if refused else ""}
    assert await world.query("SELECT step FROM process_commands") == []


def test_it_takes_one_row_in_the_registry() -> None:
    """Beside the others, as it is."""
    assert list(process_types((*PROCESSES, ORDER))) == ["transfer", "registration", "order"]
