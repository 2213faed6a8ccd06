"""Rows of what a caller may not do."""

from __future__ import annotations

from foldline.v1 import command_pb2
from shared.platform.identity import Role
from tests.e2e.errors.row import Row, bad
from tests.e2e.scene import NIL
from tests.support.clients.bank import (
    deposit,
    item,
    packed,
    unfreeze,
)

FORBIDDEN = [
    Row(
        "a user names a tenant",
        lambda s, p: s.bank.batch(item(deposit(p.theirs, 1), tenant=p.other_tenant)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row(
        "a user names the own tenant",
        lambda s, p: s.bank.batch(item(deposit(p.blue, 1), tenant=p.tenant)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row(
        "a user speaks for another",
        lambda s, p: s.bank.batch(item(deposit(p.blue, 1), on_behalf_of="bob")),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row(
        "a user names a cause",
        lambda s, p: s.bank.batch(item(deposit(p.blue, 1), causation_id=NIL)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row(
        "an operator names a tenant in a stream",
        lambda s, p: s.stream(item(deposit(p.blue, 1), tenant=p.other_tenant), bank=s.by(Role.OPERATOR)),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row("a user closes a person", lambda s, p: s.by(Role.USER).close_person(p.alice), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user deactivates", lambda s, p: s.by(Role.USER).deactivate(NIL), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row(
        "a user gives another e-mail",
        lambda s, p: s.by(Role.USER).change_email(NIL, "a@example.com"),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row("a user gives roles", lambda s, p: s.by(Role.USER).change_roles(NIL, "user"), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row(
        "a user switches an override",
        lambda s, p: s.by(Role.USER).switch_override("renaming-disabled", False),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
    Row("a user lists overrides", lambda s, p: s.by(Role.USER).list_overrides(), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user sets a rule", lambda s, p: s.set_retention("person", 1, Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user lists rules", lambda s, p: s.retention_rules(Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user plans", lambda s, p: s.plan_retention(Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    *(
        Row(
            f"an administrator of a tenant calls {rpc}",
            lambda s, p, rpc=rpc: s.tenants(rpc, p.tenant, Role.TENANT_ADMIN),  # type: ignore[misc]
            "PERMISSION_DENIED",
            "ROLE_MISSING",
        )
        for rpc in ("DescribeTenant", "ExportTenant", "PurgeTenant", "GetTenantPurge")
    ),
    Row("a user asks for totals", lambda s, p: s.totals(Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    bad("totals: a token of 513", lambda s, p: s.totals(consistency_token="x" * 513), "consistency_token"),
    Row(
        "totals: a consistency token of nobody",
        lambda s, p: s.totals(consistency_token="e30"),
        "INVALID_ARGUMENT",
        "CONSISTENCY_TOKEN_MALFORMED",
        ("consistency_token",),
    ),
    Row("a user freezes", lambda s, p: s.by(Role.USER).freeze(p.blue), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user unfreezes", lambda s, p: s.by(Role.USER).unfreeze(p.ice), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader describes", lambda s, p: s.describe("person", p.alice, Role.READER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader looks back", lambda s, p: s.state("person", p.alice, Role.READER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader compares", lambda s, p: s.diff("person", p.alice, 1, 2, Role.READER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user describes a user", lambda s, p: s.describe("user", NIL, Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user looks back at a user", lambda s, p: s.state("user", NIL, Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user compares a user", lambda s, p: s.diff("user", NIL, 1, 2, Role.USER), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user boxes", lambda s, p: s.box("person", p.alice, roles=[Role.USER]), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user unboxes", lambda s, p: s.unbox("person", p.alice, roles=[Role.USER]), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user lists boxes", lambda s, p: s.boxes(roles=[Role.USER]), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user verifies", lambda s, p: s.verify_box("person", NIL, 0, [Role.USER]), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a user reads the line", lambda s, p: s.read_all(s.by(Role.USER)), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("an operator reads the line", lambda s, p: s.read_all(s.by(Role.OPERATOR)), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader deposits", lambda s, p: s.by(Role.READER).deposit(p.blue, 1), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row("a reader asks queries", lambda s, p: s.by(Role.READER).account(p.blue), "PERMISSION_DENIED", "ROLE_MISSING"),
    Row(
        "a user packs what only a warden may send",
        lambda s, p: s.by(Role.USER).call(s.bank.commands.Send, command_pb2.SendRequest(command=packed(unfreeze(p.ice)))),
        "PERMISSION_DENIED",
        "ROLE_MISSING",
    ),
]
