"""What older events of the bank become when they are read: all steps on one screen, for the three services.

A new contract of an event is a new message; the old one stays in its `.proto` for ever, gets a step here and is no longer
written. `stored_types.py` has every type that was ever stored: `make docs` adds to it, and `make lint` fails if one of
them has no reader.
"""

from __future__ import annotations

from bank.legacy.v1.person_pb2 import PersonAdded, PersonEnrolled
from bank.v1.person_pb2 import PersonRegistered
from shared.folds.upcasting import Step, Upcasters
from upcasters import person
from upcasters.stored_types import STORED_TYPES

UPCASTERS = Upcasters(
    Step(PersonAdded, PersonEnrolled, person.enrolled),
    Step(PersonEnrolled, PersonRegistered, person.registered),
    known=STORED_TYPES,
)
