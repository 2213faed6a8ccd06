"""An order: reserve the goods, take the money, ship, confirm; or undo what was done, in reverse order, and cancel it.

    placed ──▶ reserve ──▶ pay ──▶ ship ──▶ confirm ──▶ confirmed
                  │ refused  │        │
                  │      release ◀─ refund
                  └──────────┴────▶ cancel ──▶ cancelled

A process of another domain than the bank's: to add one takes this file, and its row in a registry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from msgspec import Struct

from foldline.v1.event_store_pb2 import EventEnvelope
from shared.folds.process import Answer, ProcessDefinition, Send, Step
from tests.support.domains.messages import message_of


class OrderPlaced(Struct, frozen=True, kw_only=True):
    order_id: str
    amount: int


class OrderCommand(Struct, frozen=True, kw_only=True):
    order_id: str
    amount: int


Placed = message_of(OrderPlaced)
# Every step, with how it is undone.
STEPS = {"reserve": "release", "pay": "refund", "ship": ""}
# How it ends, and what it is then.
OVER = {"confirm": "confirmed", "cancel": "cancelled"}
REQUESTS = {
    step: message_of(OrderCommand, options=True, name=f"{step.title()}Order")
    for step in (*STEPS, *filter(None, STEPS.values()), *OVER)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is waited for, and what was done and not undone."""

    step: str = ""
    order_id: str = ""
    amount: int = 0
    done: tuple[str, ...] = ()
    reason: str = ""


def react(order: Order, event: Any, envelope: EventEnvelope) -> Step[Order] | None:
    """An order was placed."""
    if order.step:
        return None
    return _send(Order(order_id=event.order_id, amount=event.amount), "reserve")


def on_answer(order: Order, answer: Answer) -> Step[Order]:
    """The next step, or the undoing of the last step that was done."""
    if answer.step != order.step:
        return Step(state=order)
    if answer.step in OVER:
        return Step(state=replace(order, step=OVER[answer.step]), ended=True)
    if answer.step not in STEPS:
        return _back(replace(order, done=order.done[:-1]))
    if not answer.accepted:
        return _back(replace(order, reason=answer.reason))
    onward = replace(order, done=(*order.done, answer.step))
    return _send(onward, [*STEPS, "confirm"][len(onward.done)])


def on_timer(order: Order, name: str) -> Step[Order] | None:
    """It sets none."""
    return None


def _back(order: Order) -> Step[Order]:
    return _send(order, STEPS[order.done[-1]] if order.done else "cancel")


def _send(order: Order, step: str) -> Step[Order]:
    command = REQUESTS[step](order_id=order.order_id, amount=order.amount)
    return Step(state=replace(order, step=step), send=(Send(step=step, command=command),))


ORDER = ProcessDefinition(
    type="order",
    initial=Order(),
    key={Placed: attrgetter("order_id")},
    react=react,
    on_answer=on_answer,
    on_timer=on_timer,
    phase=attrgetter("step"),
)
