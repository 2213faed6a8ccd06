"""What is new in the next release, of each kind that a release can bring.

- an event's new contract: MoneyPaidIn follows MoneyDeposited, with a step that upcasts the older ones;
- a new field of a command, `reference` of DepositMoneyRequest, which the event and a query table keep;
- a new command that only processes send, NoteTransfer, with a new event, TransferNoted;
- a new step of a process: a transfer is noted before it completes, and its state has another schema;
- a new version of a group of query tables, which is rebuilt;
- a migration of each database.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PAID_IN = "bank.v1.MoneyPaidIn"
NOTED = "bank.v1.TransferNoted"
NOTE = "bank.v1.NoteTransferRequest"
REFERENCE_FIELD = 8
"""The number of `reference` in DepositMoneyRequest."""


class Change(NamedTuple):
    """A text of a file, and what takes its place wherever it stands there."""

    path: str
    old: str
    new: str


CONTRACTS = (
    Change(
        "protos/bank/v1/account.proto",
        "}\n\nmessage WithdrawMoneyRequest {",
        """  // What the payer says that it is for.
  optional string reference = 8 [(buf.validate.field).string.max_len = 100];
}

message WithdrawMoneyRequest {""",
    ),
    Change(
        "protos/bank/v1/account.proto",
        "message MoneyWithdrawn {",
        """message MoneyPaidIn {
  string account_id = 1;
  string owner_id = 2;
  int64 amount_minor = 3;
  string currency = 4;
  int64 balance_after_minor = 5;
  optional string transfer_id = 6;
  optional string counterparty_account_id = 7;
  optional string reference = 8;
}

message MoneyWithdrawn {""",
    ),
    Change(
        "protos/bank/v1/transfer.proto",
        "// What became of the money of a transfer that failed.",
        """// Sent by the transfer's process before it completes.
message NoteTransferRequest {
  foldline.v1.CommandOptions options = 1 [(buf.validate.field).required = true];
  string transfer_id = 2 [(buf.validate.field).string.uuid = true];
}

// Event: the transfer was noted.
message TransferNoted {
  string transfer_id = 1;
}

// What became of the money of a transfer that failed.""",
    ),
)

UPCASTING = (
    Change(
        "upcasters/__init__.py",
        "UPCASTERS = Upcasters(",
        """def paid_in(old: MoneyDeposited) -> MoneyPaidIn:
    return MoneyPaidIn.FromString(old.SerializeToString())


UPCASTERS = Upcasters(
    Step(MoneyDeposited, MoneyPaidIn, paid_in),""",
    ),
    Change(
        "upcasters/__init__.py",
        "from bank.v1.person_pb2 import",
        "from bank.v1.account_pb2 import MoneyDeposited, MoneyPaidIn\nfrom bank.v1.person_pb2 import",
    ),
    Change(
        "upcasters/stored_types.py",
        '"bank.v1.MoneyWithdrawn",',
        f'"bank.v1.MoneyWithdrawn", "{PAID_IN}", "{NOTED}",',
    ),
)

DECISIONS = (
    Change("write_service/domain/account.py", "MoneyDeposited", "MoneyPaidIn"),
    Change(
        "write_service/domain/account.py",
        "    return [\n        MoneyPaidIn(",
        "    return [\n        MoneyPaidIn(\n            reference=command.reference,",
    ),
    Change(
        "write_service/domain/transfer.py", "    FailTransfer,\n", "    FailTransfer,\n    NoteTransfer,\n    TransferNoted,\n"
    ),
    Change(
        "write_service/domain/transfer.py",
        "def complete(",
        '''def note(transfer: Transfer, command: NoteTransfer, meta: Meta) -> list[TransferEvent]:
    """Refusals: TRANSFER_NOT_FOUND."""
    _refuse_unless_started(transfer)
    return [TransferNoted(transfer_id=command.transfer_id)]


def complete(''',
    ),
    Change(
        "write_service/domain/transfer.py",
        "        case TransferCompleted()",
        "        case TransferNoted():\n            return transfer\n        case TransferCompleted()",
    ),
    Change(
        "write_service/registry.py",
        "    on.command(transfer_codec.COMPLETE_TRANSFER,",
        """    on.command(transfer_codec.NOTE_TRANSFER, transfer.note, id=lambda c: c.transfer_id, roles=PROCESSES)
    on.command(transfer_codec.COMPLETE_TRANSFER,""",
    ),
)

TABLES = (
    *(
        Change(f"read_service/projections/{name}.py", "account_pb2.MoneyDeposited", "account_pb2.MoneyPaidIn")
        for name in ("accounts", "people", "transfers")
    ),
    Change(
        "read_service/projections/accounts.py",
        "    boxed_at: datetime | None = None\n",
        '    boxed_at: datetime | None = None\n    reference: str = ""\n',
    ),
    Change(
        "read_service/projections/accounts.py",
        "(balance_minor=event.balance_after_minor, version=envelope.version)",
        """(
        balance_minor=event.balance_after_minor,
        version=envelope.version,
        reference=getattr(event, "reference", "") or existing(row).reference,
    )""",
    ),
    Change(
        "read_service/registry.py",
        '"accounts", (ACCOUNTS, MOVEMENTS), UPCASTERS, version=2',
        '"accounts", (ACCOUNTS, MOVEMENTS), UPCASTERS, version=3',
    ),
)

STEPS = (
    Change("saga_service/transfer.py", "            return _complete(transfer)", "            return _note(transfer)"),
    Change(
        "saga_service/transfer.py",
        '        case ("crediting", "credit", False):',
        """        case ("noting", "note", _):
            return _complete(replace(transfer, noted=answer.accepted))
        case ("crediting", "credit", False):""",
    ),
    Change(
        "saga_service/transfer.py",
        "def _complete(",
        """def _note(transfer: Transfer) -> Step[Transfer]:
    note = transfer_pb2.NoteTransferRequest(transfer_id=transfer.transfer_id)
    return _go(transfer, "noting", Send(step="note", command=note))


def _complete(""",
    ),
    Change("saga_service/transfer.py", '    reason: str = ""\n', '    reason: str = ""\n    noted: bool\n'),
    Change("saga_service/transfer.py", "initial=Transfer(),", "initial=Transfer(noted=False),"),
    Change("saga_service/transfer.py", "    started = Transfer(\n", "    started = Transfer(\n        noted=False,\n"),
    Change(
        "saga_service/transfer.py",
        "    on_timer=on_timer,\n",
        "    on_timer=on_timer,\n    schema=2,\n    migrations={1: lambda fields: {**fields, 'noted': False}},\n",
    ),
)

CHANGES = (*CONTRACTS, *UPCASTING, *DECISIONS, *TABLES, *STEPS)

MIGRATIONS: Mapping[str, str] = {
    "write": """
        ALTER TABLE events ADD COLUMN next text;
        ALTER TABLE commands ADD COLUMN next text;
        ALTER TABLE snapshots ADD COLUMN next text;
    """,
    "read": """
        ALTER TABLE accounts ADD COLUMN reference text NOT NULL DEFAULT '';
        ALTER TABLE checkpoints ADD COLUMN next text;
        ALTER TABLE parked_keys ADD COLUMN next text;
    """,
    "saga": """
        ALTER TABLE processes ADD COLUMN next text;
        ALTER TABLE process_commands ADD COLUMN next text;
        ALTER TABLE process_history ADD COLUMN next text;
        ALTER TABLE checkpoints ADD COLUMN next text;
        ALTER TABLE parked_events ADD COLUMN next text;
    """,
}
"""By service: what its bootstrap adds to the database, while processes of the release before go on."""
