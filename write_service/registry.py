"""What the write service can do, on one screen."""

from __future__ import annotations

from operator import attrgetter

from bank.v1 import account_pb2, person_pb2, transfer_pb2, user_pb2
from shared.commands.registry import CommandRegistry
from shared.folds.aggregate import on
from shared.platform.identity import Role
from write_service.domain import account, login, person, suspense, transfer, user
from write_service.domain.account import ACCOUNT
from write_service.domain.login import LOGIN
from write_service.domain.person import PERSON
from write_service.domain.suspense import SUSPENSE
from write_service.domain.transfer import TRANSFER
from write_service.domain.user import USER
from write_service.passwords import Passwords

person_id = attrgetter("person_id")
account_id = attrgetter("account_id")
owner_id = attrgetter("owner_id")
suspense_id = attrgetter("suspense_id")
transfer_id = attrgetter("transfer_id")
from_account_id = attrgetter("from_account_id")
to_account_id = attrgetter("to_account_id")
user_id = attrgetter("user_id")
login_id = attrgetter("login_id")

CALLERS = frozenset({Role.USER, Role.TENANT_ADMIN, Role.OPERATOR, Role.PROCESS})
PROCESSES = frozenset({Role.PROCESS})
ADMINS = frozenset({Role.TENANT_ADMIN, Role.OPERATOR, Role.PROCESS})


def build_registry(passwords: Passwords) -> CommandRegistry:
    """The bank's table: aggregates with their events, commands with their decisions, and what follows an event."""
    bus = CommandRegistry()

    bus.aggregate(
        PERSON,
        events={
            person.PersonRegistered: person_pb2.PersonRegistered,
            person.PersonRenamed: person_pb2.PersonRenamed,
            person.AccountAttached: person_pb2.AccountAttached,
            person.AccountDetached: person_pb2.AccountDetached,
        },
    )
    bus.register(person_pb2.RegisterPersonRequest, person.RegisterPerson, on(PERSON, person_id, person.register), CALLERS)
    bus.register(person_pb2.RenamePersonRequest, person.RenamePerson, on(PERSON, person_id, person.rename), CALLERS)

    bus.aggregate(
        ACCOUNT,
        events={
            account.AccountOpened: account_pb2.AccountOpened,
            account.MoneyDeposited: account_pb2.MoneyDeposited,
            account.MoneyWithdrawn: account_pb2.MoneyWithdrawn,
            account.AccountFrozen: account_pb2.AccountFrozen,
            account.AccountUnfrozen: account_pb2.AccountUnfrozen,
            account.AccountClosed: account_pb2.AccountClosed,
        },
    )
    bus.register(account_pb2.OpenAccountRequest, account.OpenAccount, on(ACCOUNT, account_id, account.open_account), CALLERS)
    bus.register(account_pb2.DepositMoneyRequest, account.DepositMoney, on(ACCOUNT, account_id, account.deposit), CALLERS)
    bus.register(account_pb2.WithdrawMoneyRequest, account.WithdrawMoney, on(ACCOUNT, account_id, account.withdraw), CALLERS)
    bus.register(account_pb2.FreezeAccountRequest, account.FreezeAccount, on(ACCOUNT, account_id, account.freeze), ADMINS)
    bus.register(account_pb2.UnfreezeAccountRequest, account.UnfreezeAccount, on(ACCOUNT, account_id, account.unfreeze), ADMINS)
    bus.register(account_pb2.CloseAccountRequest, account.CloseAccount, on(ACCOUNT, account_id, account.close), ADMINS)

    bus.aggregate(SUSPENSE, events={suspense.MoneySuspended: account_pb2.MoneySuspended})
    bus.register(account_pb2.SuspendMoneyRequest, suspense.SuspendMoney, on(SUSPENSE, suspense_id, suspense.suspend), PROCESSES)

    bus.aggregate(
        TRANSFER,
        events={
            transfer.TransferStarted: transfer_pb2.TransferStarted,
            transfer.TransferCompleted: transfer_pb2.TransferCompleted,
            transfer.TransferFailed: transfer_pb2.TransferFailed,
        },
    )
    bus.register(transfer_pb2.StartTransferRequest, transfer.StartTransfer, on(TRANSFER, transfer_id, transfer.start), CALLERS)
    bus.register(
        transfer_pb2.CompleteTransferRequest, transfer.CompleteTransfer, on(TRANSFER, transfer_id, transfer.complete), PROCESSES
    )
    bus.register(transfer_pb2.FailTransferRequest, transfer.FailTransfer, on(TRANSFER, transfer_id, transfer.fail), PROCESSES)

    bus.aggregate(
        USER,
        events={
            user.UserRegistrationStarted: user_pb2.UserRegistrationStarted,
            user.UserRegistrationSucceeded: user_pb2.UserRegistrationSucceeded,
            user.UserRegistrationFailed: user_pb2.UserRegistrationFailed,
        },
        readers=ADMINS,
    )
    bus.register(
        user_pb2.StartUserRegistrationRequest,
        user.StartUserRegistration,
        on(USER, user_id, user.start_registration),
        ADMINS,
        prepare=passwords.prepare,
    )
    bus.register(
        user_pb2.ConfirmUserRegistrationRequest,
        user.ConfirmUserRegistration,
        on(USER, user_id, user.confirm_registration),
        PROCESSES,
    )
    bus.register(
        user_pb2.FailUserRegistrationRequest, user.FailUserRegistration, on(USER, user_id, user.fail_registration), PROCESSES
    )

    bus.aggregate(
        LOGIN,
        events={
            login.LoginReserved: user_pb2.LoginReserved,
            login.LoginConfirmed: user_pb2.LoginConfirmed,
            login.LoginReleased: user_pb2.LoginReleased,
        },
        readers=ADMINS,
    )
    bus.register(user_pb2.ReserveLoginRequest, login.ReserveLogin, on(LOGIN, login_id, login.reserve), PROCESSES)
    bus.register(user_pb2.ConfirmLoginRequest, login.ConfirmLogin, on(LOGIN, login_id, login.confirm), PROCESSES)
    bus.register(user_pb2.ReleaseLoginRequest, login.ReleaseLogin, on(LOGIN, login_id, login.release), PROCESSES)

    # In the same transaction:
    bus.react(account.AccountOpened, on(PERSON, owner_id, person.attach_account))
    bus.react(account.AccountClosed, on(PERSON, owner_id, person.detach_account))
    bus.react(transfer.TransferStarted, on(ACCOUNT, from_account_id, account.end_of_transfer))
    bus.react(transfer.TransferStarted, on(ACCOUNT, to_account_id, account.end_of_transfer))

    return bus
