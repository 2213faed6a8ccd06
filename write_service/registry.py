"""What the write service can do, on one screen."""

from __future__ import annotations

from shared.commands.registry import CommandRegistry
from shared.commands.retention import add_retention
from shared.platform.identity import Role
from upcasters import UPCASTERS
from write_service.codec import account_codec, login_codec, person_codec, suspense_codec, transfer_codec, user_codec
from write_service.domain import account, login, person, suspense, transfer, user
from write_service.domain.account import ACCOUNT
from write_service.domain.account_types import AccountClosed, AccountOpened
from write_service.domain.login import LOGIN
from write_service.domain.person import PERSON
from write_service.domain.person_types import AccountAttached, PersonClosed
from write_service.domain.suspense import SUSPENSE
from write_service.domain.transfer import TRANSFER
from write_service.domain.transfer_types import TransferStarted
from write_service.domain.user import USER
from write_service.domain.user_types import UserDeactivated
from write_service.overrides import add_overrides
from write_service.passwords import Passwords

CALLERS = frozenset({Role.USER, Role.TENANT_ADMIN, Role.OPERATOR, Role.PROCESS})
PROCESSES = frozenset({Role.PROCESS})
ADMINS = frozenset({Role.TENANT_ADMIN, Role.OPERATOR, Role.PROCESS})


def build_registry(passwords: Passwords) -> CommandRegistry:
    """The bank's table: aggregates with their events, commands with their decisions, and reactions to events."""
    registry = CommandRegistry(UPCASTERS)
    people(registry)
    accounts(registry)
    registry.rows_of(PERSON).box_with(AccountAttached, ACCOUNT, id=lambda e: e.account_id)
    suspense_accounts(registry)
    transfers(registry)
    users(registry, passwords)
    logins(registry)
    add_overrides(registry)
    add_retention(registry, roles=ADMINS - PROCESSES)
    return registry


def people(registry: CommandRegistry) -> None:
    """The commands of a person, and the accounts that a person gains and loses."""
    on = registry.aggregate(PERSON, person_codec.EVENTS, snapshot_every=10, ended=lambda person: person.closed)
    on.command(person_codec.REGISTER_PERSON, person.register, id=lambda c: c.person_id, roles=CALLERS)
    on.command(person_codec.RENAME_PERSON, person.rename, id=lambda c: c.person_id, roles=CALLERS)
    on.command(person_codec.CLOSE_PERSON, person.close, id=lambda c: c.person_id, roles=ADMINS)
    on.react(AccountOpened, person.attach_account, id=lambda e: e.owner_id)
    on.react(AccountClosed, person.detach_account, id=lambda e: e.owner_id)


def accounts(registry: CommandRegistry) -> None:
    """The commands of an account, the transfers that it is an end of, and the closing of its owner."""
    on = registry.aggregate(
        ACCOUNT,
        account_codec.EVENTS,
        snapshot_every=100,
        ended=lambda account: account.closed and not account.balance_minor,
        purged_alone=False,  # what is on all accounts of a person is summed up from their events
    )
    on.command(account_codec.OPEN_ACCOUNT, account.open_account, id=lambda c: c.account_id, roles=CALLERS)
    on.command(account_codec.DEPOSIT_MONEY, account.deposit, id=lambda c: c.account_id, roles=CALLERS)
    on.command(account_codec.WITHDRAW_MONEY, account.withdraw, id=lambda c: c.account_id, roles=CALLERS)
    on.command(account_codec.FREEZE_ACCOUNT, account.freeze, id=lambda c: c.account_id, roles=ADMINS)
    on.command(account_codec.UNFREEZE_ACCOUNT, account.unfreeze, id=lambda c: c.account_id, roles=ADMINS)
    on.command(account_codec.CLOSE_ACCOUNT, account.close, id=lambda c: c.account_id, roles=ADMINS)
    on.react(TransferStarted, account.end_of_transfer, id=lambda e: e.from_account_id)
    on.react(TransferStarted, account.end_of_transfer, id=lambda e: e.to_account_id)
    on.react_each(PersonClosed, account.close_with_owner, ids=lambda e: e.account_ids)


def suspense_accounts(registry: CommandRegistry) -> None:
    """The command of a suspense account."""
    on = registry.aggregate(SUSPENSE, suspense_codec.EVENTS)
    on.command(suspense_codec.SUSPEND_MONEY, suspense.suspend, id=lambda c: c.suspense_id, roles=PROCESSES)


def transfers(registry: CommandRegistry) -> None:
    """The commands of a transfer: a caller starts it, its process ends it."""
    on = registry.aggregate(TRANSFER, transfer_codec.EVENTS)
    on.command(transfer_codec.START_TRANSFER, transfer.start, id=lambda c: c.transfer_id, roles=CALLERS)
    on.command(transfer_codec.COMPLETE_TRANSFER, transfer.complete, id=lambda c: c.transfer_id, roles=PROCESSES)
    on.command(transfer_codec.FAIL_TRANSFER, transfer.fail, id=lambda c: c.transfer_id, roles=PROCESSES)


def users(registry: CommandRegistry, passwords: Passwords) -> None:
    """The commands of a user: an administrator starts a registration, its process ends it, then an administrator keeps it up."""
    on = registry.aggregate(
        USER, user_codec.EVENTS, readers=ADMINS, ended=lambda user: user.failed or user.deactivated, credentials=True
    )
    on.command(
        user_codec.START_USER_REGISTRATION,
        user.start_registration,
        id=lambda c: c.user_id,
        roles=ADMINS,
        prepare=passwords.prepare,
    )
    on.command(user_codec.CONFIRM_USER_REGISTRATION, user.confirm_registration, id=lambda c: c.user_id, roles=PROCESSES)
    on.command(user_codec.FAIL_USER_REGISTRATION, user.fail_registration, id=lambda c: c.user_id, roles=PROCESSES)
    on.command(user_codec.CHANGE_USER_EMAIL, user.change_email, id=lambda c: c.user_id, roles=ADMINS)
    on.command(user_codec.CHANGE_USER_ROLES, user.change_roles, id=lambda c: c.user_id, roles=ADMINS)
    on.command(user_codec.DEACTIVATE_USER, user.deactivate, id=lambda c: c.user_id, roles=ADMINS)


def logins(registry: CommandRegistry) -> None:
    """The commands of a login, which the process of a registration sends, and the deactivation of its holder."""
    on = registry.aggregate(LOGIN, login_codec.EVENTS, readers=ADMINS, boxable=False)
    on.command(login_codec.RESERVE_LOGIN, login.reserve, id=lambda c: c.login_id, roles=PROCESSES)
    on.command(login_codec.CONFIRM_LOGIN, login.confirm, id=lambda c: c.login_id, roles=PROCESSES)
    on.command(login_codec.RELEASE_LOGIN, login.release, id=lambda c: c.login_id, roles=PROCESSES)
    on.react(UserDeactivated, login.release_with_user, id=lambda e: e.login_id)
