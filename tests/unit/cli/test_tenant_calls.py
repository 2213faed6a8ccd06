"""The certificate of a tenant's purge."""

from __future__ import annotations

from cli.tenant_calls import certified

DONE = {"tenant": "umbrella", "stage": "TENANT_PURGE_STAGE_DONE", "gone": {"events": 3}, "passed_by": ["read accounts"]}


def test_a_certificate_that_was_written_before_rows_were_counted_is_printed_again() -> None:
    """Without fields for them, and so with the hash that is on file."""
    assert certified(DONE, {}, {}) == {**DONE, "sha256": "b4a0331ced12b7427f8f5da14b54bc3340eb01834d850c71145d82f427a2c54a"}


def test_rows_that_went_are_part_of_the_hash() -> None:
    """Those of each database that counted."""
    told = certified(DONE, {"people": 1}, {})
    assert (told["gone_read"], "gone_saga" in told) == ({"people": 1}, False)
    assert told["sha256"] != certified(DONE, {"people": 1}, {"processes": 2})["sha256"] != certified(DONE, {}, {})["sha256"]
