"""The bank's commands as messages, each with an id of its own unless one is given."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message

from bank.v1 import account_pb2, person_pb2, transfer_pb2, user_pb2
from foldline.v1 import command_pb2


def new_id() -> str:
    """A fresh UUID."""
    return str(uuid4())


def options(command_id: str | None = None, **more: Any) -> command_pb2.CommandOptions:
    """The options of a command, with a new command id unless one is given."""
    return command_pb2.CommandOptions(command_id=command_id or new_id(), **more)


def packed(command: Message) -> Packed:
    """The command as CommandService takes it."""
    wrapped = Packed()
    wrapped.Pack(command)
    return wrapped


def item(command: Message, **more: str) -> command_pb2.BatchItem:
    """The command as an item of a batch."""
    return command_pb2.BatchItem(command=packed(command), **more)


def register(person_id: str, name: str, **more: Any) -> person_pb2.RegisterPersonRequest:
    """RegisterPerson; `more` goes into the options."""
    return person_pb2.RegisterPersonRequest(options=options(**more), person_id=person_id, name=name)


def rename(person_id: str, name: str, **more: Any) -> person_pb2.RenamePersonRequest:
    """RenamePerson; `more` goes into the options."""
    return person_pb2.RenamePersonRequest(options=options(**more), person_id=person_id, name=name)


def close_person(person_id: str, **more: Any) -> person_pb2.ClosePersonRequest:
    """ClosePerson; `more` goes into the options."""
    return person_pb2.ClosePersonRequest(options=options(**more), person_id=person_id)


def open_account(
    account_id: str, owner_id: str, currency: str = "USD", name: str = "blue", **more: Any
) -> account_pb2.OpenAccountRequest:
    """OpenAccount; `more` goes into the options."""
    return account_pb2.OpenAccountRequest(
        options=options(**more), account_id=account_id, owner_id=owner_id, currency=currency, name=name
    )


def deposit(account_id: str, amount_minor: int, currency: str = "USD", **more: Any) -> account_pb2.DepositMoneyRequest:
    """DepositMoney; `more` goes into the options."""
    return account_pb2.DepositMoneyRequest(
        options=options(**more), account_id=account_id, amount_minor=amount_minor, currency=currency
    )


def withdraw(account_id: str, amount_minor: int, currency: str = "USD", **more: Any) -> account_pb2.WithdrawMoneyRequest:
    """WithdrawMoney; `more` goes into the options."""
    return account_pb2.WithdrawMoneyRequest(
        options=options(**more), account_id=account_id, amount_minor=amount_minor, currency=currency
    )


def freeze(account_id: str, **more: Any) -> account_pb2.FreezeAccountRequest:
    """FreezeAccount; `more` goes into the options."""
    return account_pb2.FreezeAccountRequest(options=options(**more), account_id=account_id)


def unfreeze(account_id: str, **more: Any) -> account_pb2.UnfreezeAccountRequest:
    """UnfreezeAccount; `more` goes into the options."""
    return account_pb2.UnfreezeAccountRequest(options=options(**more), account_id=account_id)


def close(account_id: str, **more: Any) -> account_pb2.CloseAccountRequest:
    """CloseAccount; `more` goes into the options."""
    return account_pb2.CloseAccountRequest(options=options(**more), account_id=account_id)


def start_transfer(
    transfer_id: str, source: str, target: str, amount_minor: int, currency: str = "USD", **more: Any
) -> transfer_pb2.StartTransferRequest:
    """StartTransfer; `more` goes into the options."""
    return transfer_pb2.StartTransferRequest(
        options=options(**more),
        transfer_id=transfer_id,
        from_account_id=source,
        to_account_id=target,
        amount_minor=amount_minor,
        currency=currency,
    )


def start_registration(
    user_id: str, login: str, password: str, *, email: str = "somebody@example.com", **more: Any
) -> user_pb2.StartUserRegistrationRequest:
    """StartUserRegistration; `more` goes into the options."""
    return user_pb2.StartUserRegistrationRequest(
        options=options(**more), user_id=user_id, login=login, email=email, password=password
    )


def change_email(user_id: str, email: str, **more: Any) -> user_pb2.ChangeUserEmailRequest:
    """ChangeUserEmail; `more` goes into the options."""
    return user_pb2.ChangeUserEmailRequest(options=options(**more), user_id=user_id, email=email)


def change_roles(user_id: str, *roles: str, **more: Any) -> user_pb2.ChangeUserRolesRequest:
    """ChangeUserRoles; `more` goes into the options."""
    return user_pb2.ChangeUserRolesRequest(options=options(**more), user_id=user_id, roles=roles)


def deactivate(user_id: str, **more: Any) -> user_pb2.DeactivateUserRequest:
    """DeactivateUser; `more` goes into the options."""
    return user_pb2.DeactivateUserRequest(options=options(**more), user_id=user_id)
