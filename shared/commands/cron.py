"""The times of a cron expression in a time zone, and which of them are to fire.

The expression has five fields, so a schedule fires once a minute at the most. Where clocks are put forward, a time of day that
does not exist is the first that does; where they are put back, a time of day is its first occurrence. Both hold unless minute
or hour begins with `*`: such a schedule follows the time that passes, as in Debian's cron.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from msgspec import Struct

from shared.folds.errors import Invalid

CATCH_UP_MAX = 100
"""How many firings of one schedule are released at a time. The others follow when these have been sent."""

MISSED_AFTER = timedelta(minutes=1)
"""What was due while no scheduler was at work is not missed if that was for less: a replica was replaced, or the database was
away for a moment."""

FIELDS = 5

_ANY = datetime(2026, 1, 1, tzinfo=UTC)

# How far back the newest time is looked for, until one is found: few times are tried, whatever their distance.
_FIRST_WINDOW, _WINDOW_FACTOR = timedelta(minutes=2), 32


class CronTimes(Struct, frozen=True):
    """The times of an expression that was checked by `read_cron`, all in UTC."""

    expression: str
    zone: ZoneInfo

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The times after a moment, in order; ends where none follows within fifty years."""
        last = moment
        # By itself the library gives a shifted time twice, and one of the first pass when it begins in the second.
        for tick in CronSim(self.expression, moment.astimezone(self.zone)):
            found = tick.astimezone(UTC)
            if found > last:
                yield found
                last = found

    def next(self, moment: datetime) -> datetime | None:
        """The first time after a moment."""
        return next(self.after(moment), None)

    def newest(self, first: datetime, until: datetime) -> datetime:
        """The last time from `first`, which is one itself, to `until`."""
        window = _FIRST_WINDOW
        while until - window > first:
            found = self._last(until - window, until)
            if found is not None:
                return found
            window *= _WINDOW_FACTOR
        return self._last(first, until) or first

    def _last(self, after: datetime, until: datetime) -> datetime | None:
        last = None
        for time in self.after(after):
            if time > until:
                break
            last = time
        return last


def read_cron(expression: str, time_zone: str) -> CronTimes:
    """The times of an expression. Raises Invalid (TIME_ZONE_UNKNOWN, CRON_INVALID, CRON_NEVER_FIRES)."""
    if time_zone not in _zones():
        must = "must be a name of the IANA database, such as Europe/Berlin"
        raise Invalid("TIME_ZONE_UNKNOWN", "there is no such time zone", violations=(("time_zone", must),))
    fields = expression.split()
    if len(fields) != FIELDS or not expression.isascii():
        raise _invalid("must have five fields: minute, hour, day of the month, month, day of the week")
    try:
        CronSim(" ".join(fields), _ANY)
    except CronSimError as error:
        if str(error) == "Bad day-of-month" and _is_of_some_month(fields):
            raise _never_fires() from None
        raise _invalid(f"has a {str(error)[:1].lower()}{str(error)[1:]}") from None
    except (AssertionError, TypeError, ValueError):
        raise _invalid("must have numbers, names, ranges, lists and steps") from None
    return CronTimes(" ".join(fields), ZoneInfo(time_zone))


def first_time(times: CronTimes, now: datetime) -> datetime:
    """The first time from now on. Raises Invalid (CRON_NEVER_FIRES)."""
    first = times.next(now)
    if first is None:
        raise _never_fires()
    return first


class Firings(Struct, frozen=True):
    """The times that fire now, in order, and the one after them: None if there is none."""

    due: list[datetime]
    next: datetime | None


class Away(Struct, frozen=True):
    """The last time that no scheduler was at work: behind one moment, until another."""

    since: datetime
    until: datetime

    def missed(self, time: datetime) -> bool:
        """Whether nobody was there at a time, and not for a moment only."""
        return self.since < time <= self.until and self.until - self.since > MISSED_AFTER


def firings(times: CronTimes, catch_up: str, due_at: datetime, now: datetime, limit: int, away: Away | None = None) -> Firings:
    """Which firings are due of a schedule whose next time, `due_at`, has come; at most `limit`.

    If it is not known when a scheduler was `away`, what is late by more than MISSED_AFTER counts as missed.
    """
    if catch_up == "all":
        due, following = [due_at], None
        for following in times.after(due_at):
            if following > now or len(due) == limit:
                break
            due.append(following)
        else:
            following = None
        return Firings(due, following)
    newest = times.newest(due_at, now)
    missed = now - newest > MISSED_AFTER if away is None else away.missed(newest)
    return Firings([] if missed and catch_up == "none" else [newest], times.next(newest))


@cache
def _zones() -> frozenset[str]:
    """The names of the time zones. The list comes with the pinned data, so all replicas know the same."""
    return frozenset(resources.files("tzdata").joinpath("zones").read_text().split()) - {"Factory"}


def _is_of_some_month(fields: list[str]) -> bool:
    """Whether the expression would be well formed if its months had more days: the thirtieth of February, for one."""
    minute, hour, day, _, weekday = fields
    try:
        CronSim(f"{minute} {hour} {day} * {weekday}", _ANY)
    except CronSimError:
        return False
    return True


def _invalid(problem: str) -> Invalid:
    return Invalid("CRON_INVALID", f"the cron expression {problem}", violations=(("cron", problem),))


def _never_fires() -> Invalid:
    must = "must have a time within fifty years"
    return Invalid("CRON_NEVER_FIRES", "the cron expression has no time", violations=(("cron", must),))
