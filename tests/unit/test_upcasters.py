"""The bank's older events, and that none of them loses its reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bank.legacy.v1.person_pb2 import PersonAdded, PersonEnrolled
from bank.v1.person_pb2 import PersonRegistered
from docs import generate
from read_service.registry import GROUPS
from shared.line.event_store import PURGED
from upcasters import UPCASTERS


@pytest.mark.parametrize(
    ("old", "name"),
    [
        (PersonAdded(person_id="p", last_and_first_name="O'Wonderland, Alice"), "Alice O'Wonderland"),
        (PersonAdded(person_id="p", last_and_first_name="Humpty"), "Humpty"),
        (PersonAdded(person_id="p", last_and_first_name="Cooper,Alice, the Great"), "Alice, the Great Cooper"),
        (PersonEnrolled(person_id="p", first_name="Mad", last_name="Hatter"), "Mad Hatter"),
        (PersonEnrolled(person_id="p", first_name="Cher"), "Cher"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_names_of_old_are_names_of_today(old: PersonAdded | PersonEnrolled, name: str) -> None:
    """First name first, no blanks around it."""
    type_name, payload = UPCASTERS.upcast(old.DESCRIPTOR.full_name, old.SerializeToString())
    assert type_name == "bank.v1.PersonRegistered"
    assert PersonRegistered.FromString(payload) == PersonRegistered(person_id="p", name=name)


def test_a_stored_type_without_a_reader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was ever stored is listed; a type that no codec and no step knows is named, and a new type is added."""
    assert generate.unread_types() == []
    assert {UPCASTERS.newest(name) for name in generate.stored_types()} >= {"bank.v1.PersonRegistered"}
    monkeypatch.setattr(generate, "STORED_TYPES", frozenset({"bank.legacy.v1.PersonAdded", "bank.v1.PersonVanished"}))
    assert generate.unread_types() == ["bank.v1.PersonVanished"]
    assert {"bank.v1.MoneyDeposited", "bank.v1.PersonVanished"} <= generate.stored_types()


def test_every_event_of_this_release_is_known_to_all_services() -> None:
    """Another is of a newer release, and parks its aggregate at whoever meets it."""
    assert all(UPCASTERS.knows(name) for name in generate.stored_types())
    assert UPCASTERS.knows(PURGED)
    assert not UPCASTERS.knows("bank.v9.Unheard")
    assert all(group.upcasters is UPCASTERS for group in GROUPS)


def test_the_page_for_other_teams_says_what_took_the_place_of_each_retired_event() -> None:
    """What ReadAll gives instead, for every old event that has a step."""
    page = (Path(generate.ROOT) / "docs/events.md").read_text()
    told = dict(re.findall(r"\*\*`([\w.]+)`\*\* \(retired: now `([\w.]+)`\)", page))
    assert told == {old: UPCASTERS.newest(old) for old in generate.stored_types() if UPCASTERS.newest(old) != old}
