"""Lines of the log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from contextvars import copy_context
from typing import Any

import pytest

from shared.platform import telemetry
from shared.platform.identity import Call, Identity, current_call
from tests.support.system.waiting import eventually


@pytest.fixture
def stream() -> io.BytesIO:
    """Where the log goes."""
    made = io.BytesIO()
    telemetry.configure("info", service="test", stream=made)
    return made


def lines(stream: io.BytesIO) -> list[dict[str, Any]]:
    """What was logged."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_within_a_call_carries_trace_tenant_and_what_was_noted(stream: io.BytesIO) -> None:
    """Any module's line can be found by the trace, the tenant or the command it belongs to."""

    def within_a_call() -> None:
        identity = Identity(tenant="acme", user_id="alice", roles=frozenset())
        current_call.set(Call(identity=identity, method="m", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01"))
        telemetry.call_facts.set({"trace_id": "a" * 32})
        telemetry.annotate(command_id="c")
        telemetry.logger("some.module").info("something happened", number=7)

    copy_context().run(within_a_call)
    [line] = lines(stream)
    what = {"event": "something happened", "number": 7, "module": "some.module", "service": "test", "level": "info"}
    assert what.items() <= line.items()
    assert {"trace_id": "a" * 32, "tenant": "acme", "user": "alice", "command_id": "c"}.items() <= line.items()
    assert line["time"].endswith("+00:00")


def test_outside_of_a_call_nothing_is_added(stream: io.BytesIO) -> None:
    """`annotate` may be called anywhere."""
    telemetry.annotate(command_id="c")
    telemetry.logger("m").warning("event")
    [line] = lines(stream)
    assert not {"trace_id", "tenant", "command_id"} & set(line)


def test_tools_that_set_up_nothing_log_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """As in tools and tests that see to the log themselves."""
    telemetry.divert(telemetry.Unconfigured())
    telemetry.logger("m").info("event", number=7)
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["number"], line["module"], line["level"]) == ("event", 7, "m", "info")


def test_levels_below_the_chosen_one_are_dropped(stream: io.BytesIO) -> None:
    """The level is the process's setting."""
    telemetry.logger("m").debug("event")
    assert lines(stream) == []


def test_a_traceback_and_odd_values_make_one_line_of_json(stream: io.BytesIO) -> None:
    """Nothing that is logged breaks the log."""
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        telemetry.logger("m").exception("event", odd=object(), text="a\nb")
    [line] = lines(stream)
    assert "ValueError: first\nsecond" in line["exception"]
    assert line["text"] == "a\nb"


def test_a_line_that_cannot_be_made_takes_no_other_along() -> None:
    """A text that is no text, in the middle of a moment: it is told as well as it can be, and so are its neighbours."""
    stream = CountingStream()
    telemetry.configure("info", service="test", stream=stream)
    log = telemetry.logger("m")

    async def a_moment() -> None:
        for text in ("before", "half a character: \ud800", "after"):
            log.info("event", text=text)
        await eventually(lambda: stream.writes == 1)

    asyncio.run(a_moment())
    assert [line["text"] for line in lines(stream)] == ["before", "'half a character: \\ud800'", "after"]


def test_what_libraries_warn_of_is_a_line_too(stream: io.BytesIO) -> None:
    """One format for all; what libraries say below a warning is left out."""
    logging.getLogger("some.library").warning("%s is odd", "this")
    logging.getLogger("some.library").info("chatter")
    [line] = lines(stream)
    assert (line["event"], line["module"], line["level"]) == ("this is odd", "some.library", "warning")


def test_a_new_trace_context_is_a_valid_one() -> None:
    """And no two are the same."""
    made = [telemetry.new_traceparent() for _ in range(100)]
    assert all(telemetry.valid_traceparent(one) == one for one in made)
    assert len({telemetry.trace_id(one) for one in made}) == 100


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
    ],
)
def test_what_is_no_trace_context_is_none(text: str | None) -> None:
    """Only what W3C describes as version 00 is taken over."""
    assert telemetry.valid_traceparent(text) is None


class CountingStream(io.BytesIO):
    """Counts what would be system calls."""

    writes = 0

    def write(self, data: Any) -> int:
        """Takes bytes."""
        self.writes += 1
        return super().write(data)


def test_the_lines_of_a_moment_are_written_together() -> None:
    """A busy loop pays one system call for many lines, keeps their order, and no later loop waits for an earlier one."""
    stream = CountingStream()
    telemetry.configure("info", service="test", stream=stream)
    log = telemetry.logger("m")

    async def a_moment() -> None:
        for number in range(3):
            log.info("event", number=number)
            await asyncio.sleep(0)
        assert stream.writes == 0
        await eventually(lambda: stream.writes == 1)
        log.info("event", number=3)

    async def another() -> None:
        log.info("event", number=5)
        await eventually(lambda: stream.writes == 3)

    asyncio.run(a_moment())
    log.info("event", number=4)
    asyncio.run(another())
    assert [line["number"] for line in lines(stream)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_warning_is_written_at_once_with_what_came_before(level: str) -> None:
    """Whoever dies of what it warns of has said so."""
    stream = CountingStream()
    telemetry.configure("info", service="test", stream=stream)
    log = telemetry.logger("m")

    async def trouble() -> None:
        log.info("event", number=0)
        getattr(log, level)("event", number=1)
        assert stream.writes == 1
        log.info("event", number=2)
        assert stream.writes == 1
        await eventually(lambda: stream.writes == 2)

    asyncio.run(trouble())
    assert [line["number"] for line in lines(stream)] == [0, 1, 2]
