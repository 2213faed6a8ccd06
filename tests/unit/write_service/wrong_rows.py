"""Rows and codecs that do not fit. mypy refuses each line that ends in `# wrong`, and no other.

No test runs this file and mypy does not check it with the rest: `tests/unit/test_wrong_rows.py` gives it to mypy.
"""

from __future__ import annotations

from bank.v1 import account_pb2
from shared.commands.codec import EventCodecs, MessageCodec
from shared.commands.registry import CommandRegistry
from shared.folds.aggregate import Aggregate
from write_service.codec import account_codec, login_codec, person_codec, transfer_codec, user_codec
from write_service.codec.account_codec import decode_account_frozen, encode_account_frozen, encode_account_unfrozen
from write_service.domain import account, login, person, user
from write_service.domain.account import ACCOUNT
from write_service.domain.account_types import AccountEvent, AccountFrozen, AccountOpened, FreezeAccount
from write_service.domain.person import PERSON
from write_service.domain.person_types import PersonClosed
from write_service.domain.transfer import TRANSFER
from write_service.domain.transfer_types import StartTransfer, TransferStarted
from write_service.domain.user import USER
from write_service.passwords import Passwords
from write_service.registry import ADMINS, CALLERS


def commands(registry: CommandRegistry, passwords: Passwords) -> None:
    """Commands, each with a decision, an id, roles or a preparation that is not its own."""
    on = registry.aggregate(ACCOUNT, account_codec.EVENTS)
    on.command(account_codec.FREEZE_ACCOUNT, account.freeze, id=lambda c: c.account_id, roles=ADMINS)
    on.command(account_codec.FREEZE_ACCOUNT, account.close, id=lambda c: c.account_id, roles=ADMINS)  # wrong
    on.command(account_codec.FREEZE_ACCOUNT, account.unfreeze, id=lambda c: c.account_id, roles=ADMINS)  # wrong
    on.command(account_codec.ACCOUNT_FROZEN, account.freeze, id=lambda c: c.account_id, roles=ADMINS)  # wrong
    on.command(account_codec.FREEZE_ACCOUNT, account.freeze, id=lambda c: c.acount_id, roles=ADMINS)  # wrong
    on.command(account_codec.FREEZE_ACCOUNT, account.freeze, id=lambda c: c.transfer_id, roles=ADMINS)  # wrong
    on.command(account_codec.DEPOSIT_MONEY, account.deposit, id=lambda c: c.amount_minor, roles=CALLERS)  # wrong
    on.command(account_codec.DEPOSIT_MONEY, account.deposit, id=lambda c: c.transfer_id, roles=CALLERS)  # wrong
    on.command(account_codec.FREEZE_ACCOUNT, account.freeze, id=lambda c: c.account_id, roles=frozenset({"admin"}))  # wrong
    on.command(account_codec.FREEZE_ACCOUNT, account.freeze, id=lambda c: c.account_id)  # wrong
    on.command(person_codec.RENAME_PERSON, person.rename, id=lambda c: c.person_id, roles=CALLERS)  # wrong
    on.command(login_codec.RESERVE_LOGIN, login.reserve, id=lambda c: c.login_id, roles=ADMINS)  # wrong

    users, hashed = registry.aggregate(USER, user_codec.EVENTS), passwords.prepare
    start, fail = user_codec.START_USER_REGISTRATION, user_codec.FAIL_USER_REGISTRATION
    users.command(start, user.start_registration, id=lambda c: c.user_id, roles=ADMINS, prepare=hashed)
    users.command(fail, user.fail_registration, id=lambda c: c.user_id, roles=ADMINS, prepare=hashed)  # wrong


def events(registry: CommandRegistry) -> None:
    """Events of another aggregate, and a state that its evolve does not know."""
    registry.aggregate(ACCOUNT, account_codec.EVENTS)
    registry.aggregate(ACCOUNT, person_codec.EVENTS)  # wrong
    registry.aggregate(ACCOUNT, account_codec.MONEY_DEPOSITED)  # wrong
    registry.aggregate(PERSON, account_codec.EVENTS)  # wrong
    Aggregate(category="account", initial=person.Person(), evolve=account.evolve)  # wrong


def reactions(registry: CommandRegistry) -> None:
    """Reactions to another event than the decision's, of another aggregate, or with an id that the event has not."""
    on = registry.aggregate(ACCOUNT, account_codec.EVENTS)
    on.react(TransferStarted, account.end_of_transfer, id=lambda e: e.from_account_id)
    on.react(TransferStarted, account.end_of_transfer, id=lambda e: e.from_acount_id)  # wrong
    on.react(TransferStarted, account.end_of_transfer, id=lambda e: e.amount_minor)  # wrong
    on.react(AccountOpened, account.end_of_transfer, id=lambda e: e.account_id)  # wrong
    on.react(StartTransfer, account.end_of_transfer, id=lambda e: e.from_account_id)  # wrong
    on.react(transfer_codec.TRANSFER_STARTED, account.end_of_transfer, id=lambda e: e.from_account_id)  # wrong
    on.react(AccountOpened, person.attach_account, id=lambda e: e.owner_id)  # wrong
    registry.rows_of(TRANSFER).react(TransferStarted, account.end_of_transfer, id=lambda e: e.from_account_id)  # wrong
    on.react(TransferStarted, account.end_of_transfer, id=lambda e: e.from_account_id, tenant=("umbrella",))  # wrong

    on.react_each(PersonClosed, account.close_with_owner, ids=lambda e: e.account_ids)
    on.react_each(PersonClosed, account.close_with_owner, ids=lambda e: e.account_ids, tenant="umbrella", name="noted")
    on.react_each(PersonClosed, account.close_with_owner, ids=lambda e: e.acount_ids)  # wrong
    on.react_each(PersonClosed, account.close_with_owner, ids=lambda e: e.person_id)  # wrong
    on.react_each(PersonClosed, account.close_with_owner, id=lambda e: e.person_id)  # wrong
    on.react_each(PersonClosed, account.end_of_transfer, ids=lambda e: e.account_ids)  # wrong
    on.react_each(AccountOpened, account.close_with_owner, ids=lambda e: (e.account_id,))  # wrong
    on.react_each(PersonClosed, person.attach_account, ids=lambda e: e.account_ids)  # wrong
    on.react_each(PersonClosed, account.close_with_owner, ids=lambda e: e.account_ids, tenant=None)
    on.react_each(PersonClosed, account.close_with_owner, ids=lambda e: e.account_ids, tenant=7)  # wrong


def overrides(registry: CommandRegistry) -> None:
    """Decisions of a tenant on another command, or on another aggregate."""
    on = registry.rows_of(ACCOUNT)
    on.override(account_codec.FREEZE_ACCOUNT, account.freeze, tenant="umbrella", name="other")
    on.override(account_codec.FREEZE_ACCOUNT, account.close, tenant="umbrella", name="other")  # wrong
    on.override(person_codec.RENAME_PERSON, person.rename, tenant="umbrella", name="other")  # wrong
    on.override(FreezeAccount, account.freeze, tenant="umbrella", name="other")  # wrong


def codecs() -> None:
    """The message, the struct or a function of another codec; the events of another aggregate."""
    MessageCodec(AccountFrozen, account_pb2.AccountFrozen, decode_account_frozen, encode_account_frozen)
    MessageCodec(AccountFrozen, account_pb2.AccountUnfrozen, decode_account_frozen, encode_account_frozen)  # wrong
    MessageCodec(AccountFrozen, account_pb2.AccountFrozen, decode_account_frozen, encode_account_unfrozen)  # wrong
    MessageCodec(FreezeAccount, account_pb2.AccountFrozen, decode_account_frozen, encode_account_frozen)  # wrong
    _some: EventCodecs[AccountEvent] = EventCodecs(account_codec.ACCOUNT_FROZEN, account_codec.ACCOUNT_UNFROZEN)
    _another: EventCodecs[AccountEvent] = EventCodecs(account_codec.ACCOUNT_FROZEN, person_codec.PERSON_RENAMED)  # wrong
    _asked: EventCodecs[AccountEvent] = EventCodecs(account_codec.FREEZE_ACCOUNT)  # wrong
