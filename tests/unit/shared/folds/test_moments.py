"""Moments as messages carry them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from shared.folds.moments import timestamp

ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=ZONES))  # noqa: DTZ001 (the zone is another argument)
def test_a_timestamp_is_the_same_moment(moment: datetime) -> None:
    """To the microsecond, before 1970 as well, in any time zone: as protobuf's own conversion, which takes twice as long."""
    wanted = Timestamp()
    wanted.FromDatetime(moment)
    assert timestamp(moment) == wanted
    assert timestamp(moment).ToDatetime(UTC) == moment
