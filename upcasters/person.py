"""A person's older events."""

from __future__ import annotations

from bank.legacy.v1.person_pb2 import PersonAdded, PersonEnrolled
from bank.v1.person_pb2 import PersonRegistered


def enrolled(old: PersonAdded) -> PersonEnrolled:
    """The name in two fields."""
    last, _, first = old.last_and_first_name.partition(",")
    return PersonEnrolled(person_id=old.person_id, first_name=first.strip(), last_name=last.strip())


def registered(old: PersonEnrolled) -> PersonRegistered:
    """One name, the first name first."""
    return PersonRegistered(person_id=old.person_id, name=f"{old.first_name} {old.last_name}".strip())
