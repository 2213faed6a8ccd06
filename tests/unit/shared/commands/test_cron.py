"""Times of cron expressions: on the days on which clocks are put forward and back, and what is refused."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.commands.cron import CATCH_UP_MAX, Away, CronTimes, firings, first_time, read_cron
from shared.folds.errors import Invalid

NOW = datetime(2026, 6, 1, 10, 2, 10, tzinfo=UTC)


def times_of(expression: str, zone: str, after: str, count: int) -> list[str]:
    """The next times behind a moment of the zone's own clock, as that clock shows them."""
    times = read_cron(expression, zone)
    moment = datetime.fromisoformat(after).replace(tzinfo=times.zone).astimezone(UTC)
    return [f"{time.astimezone(times.zone):%d.%m. %H:%M %Z}" for time in itertools.islice(times.after(moment), count)]


@pytest.mark.parametrize(
    ("expression", "zone", "after", "expected"),
    [
        # In Berlin, 02:00 to 03:00 does not exist on 29 March 2026 and exists twice on 25 October.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["29.03. 03:00 CEST", "30.03. 02:30 CEST"]),
        ("0,30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["29.03. 03:00 CEST", "30.03. 02:00 CEST"]),
        ("30 2,3 * * *", "Europe/Berlin", "2026-03-28T12:00", ["29.03. 03:00 CEST", "29.03. 03:30 CEST"]),
        ("*/30 * * * *", "Europe/Berlin", "2026-03-29T01:00", ["29.03. 01:30 CET", "29.03. 03:00 CEST", "29.03. 03:30 CEST"]),
        ("*/15 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["30.03. 02:00 CEST", "30.03. 02:15 CEST"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", ["25.10. 02:30 CEST", "26.10. 02:30 CET"]),
        ("30 * * * *", "Europe/Berlin", "2026-10-25T01:00", ["25.10. 01:30 CEST", "25.10. 02:30 CEST", "25.10. 02:30 CET"]),
        ("0 0 * * *", "Europe/Berlin", "2026-10-24T12:00", ["25.10. 00:00 CEST", "26.10. 00:00 CET"]),
        # In Lord Howe clocks are moved by half an hour: 02:00 to 02:30 does not exist on 4 October 2026.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00", ["04.10. 02:30 +11", "05.10. 02:15 +11"]),
        # In Beirut the day that begins summer time has no midnight: 29 March 2026.
        ("0 0 * * *", "Asia/Beirut", "2026-03-28T12:00", ["29.03. 01:00 EEST", "30.03. 00:00 EEST"]),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00", ["29.02. 00:00 UTC"]),
        ("0 12 L * *", "UTC", "2026-02-01T00:00", ["28.02. 12:00 UTC", "31.03. 12:00 UTC"]),
        ("0 9 * * mon#2", "UTC", "2026-06-01T00:00", ["08.06. 09:00 UTC", "13.07. 09:00 UTC"]),
        ("  0   9  1 jan-mar   *  ", "UTC", "2026-06-01T00:00", ["01.01. 09:00 UTC", "01.02. 09:00 UTC"]),
    ],
)
def test_times(expression: str, zone: str, after: str, expected: list[str]) -> None:
    """A time of day that does not exist is the first that does, and one that exists twice is its first."""
    assert times_of(expression, zone, after, len(expected)) == expected


def test_a_time_of_day_does_not_come_again_in_the_second_pass() -> None:
    """Begun within the hour that is repeated: half past two was an hour ago, though the clock shows ten past."""
    times = read_cron("30 2 * * *", "Europe/Berlin")
    second_pass = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)
    assert f"{second_pass.astimezone(times.zone):%H:%M %Z}" == "02:10 CET"
    assert times.next(second_pass) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "zone", "reason"),
    [
        ("", "UTC", "CRON_INVALID"),
        ("* * * *", "UTC", "CRON_INVALID"),
        ("*/10 * * * * *", "UTC", "CRON_INVALID"),
        ("@daily", "UTC", "CRON_INVALID"),
        ("60 * * * *", "UTC", "CRON_INVALID"),
        ("0 24 * * *", "UTC", "CRON_INVALID"),
        ("0 0 32 * *", "UTC", "CRON_INVALID"),
        ("0 0 30 13 *", "UTC", "CRON_INVALID"),
        ("0 0 * * 8", "UTC", "CRON_INVALID"),
        ("0 0 * * mon#6", "UTC", "CRON_INVALID"),
        ("0 0 * * mon#2/2", "UTC", "CRON_INVALID"),
        ("5-1 * * * *", "UTC", "CRON_INVALID"),
        ("*/0 * * * *", "UTC", "CRON_INVALID"),
        ("٣ * * * *", "UTC", "CRON_INVALID"),
        ("9" * 120 + " * * * *", "UTC", "CRON_INVALID"),
        ("0 0 30 2 *", "UTC", "CRON_NEVER_FIRES"),
        ("0 0 31 4,6,9,11 *", "UTC", "CRON_NEVER_FIRES"),
        ("0 0 */31 * mon#5", "UTC", "CRON_NEVER_FIRES"),
        ("* * * * *", "Europe/Atlantis", "TIME_ZONE_UNKNOWN"),
        ("* * * * *", "../etc/passwd", "TIME_ZONE_UNKNOWN"),
        ("* * * * *", "Europe", "TIME_ZONE_UNKNOWN"),
        ("* * * * *", "europe/berlin", "TIME_ZONE_UNKNOWN"),
        ("* * * * *", "Factory", "TIME_ZONE_UNKNOWN"),
    ],
)
def test_what_cannot_be_is_refused_by_name(expression: str, zone: str, reason: str) -> None:
    """Malformed, without a time, in no zone: each says which field."""
    with pytest.raises(Invalid) as refused:
        first_time(read_cron(expression, zone), NOW)
    assert refused.value.reason == reason
    [(field, _)] = refused.value.violations
    assert field == ("time_zone" if reason == "TIME_ZONE_UNKNOWN" else "cron")


FIELDS = st.sampled_from(["*", "*/7", "0", "15", "0,30", "1-3", "2", "*/2"])
ZONES = st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe", "America/Havana", "Asia/Beirut", "Africa/Casablanca"])
AROUND = st.sampled_from(
    [datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 10, 24, tzinfo=UTC), datetime(2026, 3, 8, tzinfo=UTC)]
)


@settings(max_examples=150, deadline=None)
@given(FIELDS, st.sampled_from(["*", "2", "0", "*/2", "1,2,3", "0-3"]), ZONES, AROUND, st.integers(0, 4 * 86_400), st.data())
def test_wherever_the_times_are_asked_for_they_are_the_same(
    minute: str, hour: str, zone: str, around: datetime, offset_s: int, data: st.DataObject
) -> None:
    """In order, none twice; begun anywhere, the next is the first behind it, and the newest the last before it."""
    times = read_cron(f"{minute} {hour} * * *", zone)
    found = list(itertools.takewhile(lambda time: time < around + timedelta(days=6), times.after(around)))
    assert found == sorted(set(found))
    moment = around + timedelta(seconds=offset_s)
    assert times.next(moment) == next(time for time in found if time > moment)
    first = data.draw(st.sampled_from(found))
    until = max(moment, first)
    assert times.newest(first, until) == max(time for time in found if time <= until)


def daily(hour: int = 9) -> CronTimes:
    """Every day at an hour."""
    return read_cron(f"0 {hour} * * *", "UTC")


EVERY_MINUTE = read_cron("* * * * *", "UTC")


def at(hour: int, minute: int, day: int = 1) -> datetime:
    """A moment of June 2026."""
    return datetime(2026, 6, day, hour, minute, tzinfo=UTC)


def test_a_firing_that_is_hardly_late_is_not_missed() -> None:
    """Whatever is said about catching up, it fires."""
    for catch_up in ("none", "one", "all"):
        found = firings(daily(10), catch_up, at(10, 0), at(10, 0) + timedelta(seconds=60), 100)
        assert (found.due, found.next) == ([at(10, 0)], at(10, 0, day=2))


def test_what_is_late_is_missed_only_if_no_scheduler_was_there() -> None:
    """For more than a minute. The times of `away` belong to it as the last time before and the first time again do."""
    for since, until, missed in (
        (at(8, 0), at(9, 30), True),
        (at(8, 0), at(9, 0), True),
        (at(9, 0), at(9, 30), False),  # it was there at nine
        (at(6, 0), at(8, 59), False),  # it was there again
        (at(8, 59) + timedelta(seconds=30), at(9, 0) + timedelta(seconds=30), False),  # away for a minute
    ):
        found = firings(daily(), "none", at(9, 0), NOW, 100, Away(since, until))
        assert (found.due, found.next) == ([] if missed else [at(9, 0)], at(9, 0, day=2))
        assert firings(daily(), "one", at(9, 0), NOW, 100, Away(since, until)).due == [at(9, 0)]


def test_none_of_what_was_missed_fires() -> None:
    """The schedule goes on with its next time; of times that come every minute the newest is hardly late."""
    found = firings(daily(), "none", at(9, 0), NOW, 100)
    assert (found.due, found.next) == ([], at(9, 0, day=2))
    found = firings(EVERY_MINUTE, "none", at(9, 0), NOW, 100)
    assert (found.due, found.next) == ([at(10, 2)], at(10, 3))


def test_one_for_all_that_were_missed() -> None:
    """The newest, however old it is: after a minute, and after a year of minutes."""
    found = firings(daily(), "one", at(9, 0), at(8, 0, day=20), 100)
    assert (found.due, found.next) == ([at(9, 0, day=19)], at(9, 0, day=20))
    found = firings(EVERY_MINUTE, "one", at(9, 0) - timedelta(days=365), NOW, 100)
    assert (found.due, found.next) == ([at(10, 2)], at(10, 3))


def test_all_that_were_missed_in_order_so_many_at_a_time() -> None:
    """What is beyond the limit stays due."""
    found = firings(daily(), "all", at(9, 0), at(10, 0, day=3), 100)
    assert (found.due, found.next) == ([at(9, 0, day=day) for day in (1, 2, 3)], at(9, 0, day=4))
    found = firings(EVERY_MINUTE, "all", at(0, 0), NOW, CATCH_UP_MAX)
    assert (len(found.due), found.due[-1], found.next) == (100, at(1, 39), at(1, 40))
