"""Logins: which are the same, which are none, and who holds one."""

from __future__ import annotations

import unicodedata
from datetime import timedelta
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from msgspec.structs import replace

from shared.folds.errors import Invalid
from tests.support.checks.scenario import META, given
from write_service.domain.login import LOGIN, Login, confirm, fold_login, login_id, release, release_with_user, reserve
from write_service.domain.login_types import (
    ConfirmLogin,
    LoginConfirmed,
    LoginReleased,
    LoginReserved,
    ReleaseLogin,
    ReserveLogin,
)
from write_service.domain.user_types import UserDeactivated

# (one way to write it, another, the form in which they are compared)
SAME = {
    "case": ("ALICE", "alice", "alice"),
    "case of another script": ("ΑΛΊΚΗ", "αλίκη", "αλίκη"),
    "a final sigma": ("ΟΔΟΣ", "οδος", "οδοσ"),
    "ß and SS": ("Straße", "STRASSE", "strasse"),
    "capital ß": ("Stra\u1e9ee", "strasse", "strasse"),
    "full width": ("\uff21\uff4c\uff49\uff43\uff45\uff11", "alice1", "alice1"),
    "a combining ring": ("A\u030angstro\u0308m", "\u00c5ngstr\u00f6m", "\u00e5ngstr\u00f6m"),
    "the sign of the unit": ("\u212bngstrom", "\u00e5ngstrom", "\u00e5ngstrom"),
    "two marks in another order": ("q\u0307\u0323", "q\u0323\u0307", "q\u0323\u0307"),
    "a ligature": ("\ufb01nn", "FINN", "finn"),
    "a superscript": ("x\u00b2", "X2", "x2"),
    "a circled letter": ("\u24b6da", "ada", "ada"),
    "a dotted capital I": ("\u0130", "i\u0307", "i\u0307"),
    "the sign Kelvin": ("\u212aelvin", "kelvin", "kelvin"),
    "a letter that folds to a letter and a mark": ("\u01f0", "J\u030c", "\u01f0"),
    "what changes under NFKC only after folding": ("\u0345", "\u03b9", "\u03b9"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_looks_the_same_is_the_same(name: str) -> None:
    """Both fold to one form, which folds to itself, and are one aggregate."""
    one, other, form = SAME[name]
    assert (fold_login(one), fold_login(other), fold_login(form)) == (form, form, form)
    assert login_id("acme", one) == login_id("acme", other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("alice", "alicia"), ("alice", "al\u0131ce"), ("a", "\u0430"), ("o", "0"), ("e", "\u00e9"), ("a.b", "ab")],
    ids=["more letters", "a dotless i", "a Cyrillic a", "a zero", "an accent", "a dot"],
)
def test_what_is_another_login_stays_another(one: str, other: str) -> None:
    """Folding takes away the way of writing, and nothing more."""
    assert login_id("acme", one) != login_id("acme", other)


# What begins a letter and what goes with one, where writing it in another way is easiest.
letters = st.sampled_from("aA\u0131İßẞ\u017fsSςΣΩώ\u0345\ufb01\u01f0\u212a\u212b\u01c5한é\uff21") | st.characters(codec="utf-8")
marks = st.sampled_from("\u0300\u0301\u0307\u0308\u030a\u030c\u0323\u0345\u1df7\u20ea")


@hypothesis.given(st.lists(letters | marks, min_size=1, max_size=6).map("".join))
def test_folding_is_stable(login: str) -> None:
    """Whatever is a login: its form is one too, the same, and so is every way to write it that is canonically equal."""
    try:
        form = fold_login(login)
    except Invalid:
        hypothesis.reject()
    assert fold_login(form) == form
    assert fold_login(unicodedata.normalize("NFD", login)) == form
    assert fold_login(unicodedata.normalize("NFKC", login)) == form


def test_each_tenant_has_its_own_logins() -> None:
    """Also if the tenant's and the login's letters are shared out otherwise."""
    assert len({login_id("acme", "alice"), login_id("umbrella", "alice"), login_id("acmea", "lice")}) == 3


NOT_ALLOWED = {
    "a space": ("a b", "U+0020"),
    "a space before": (" a", "U+0020"),
    "only a space": (" ", "U+0020"),
    "a space that does not break": ("a\u00a0b", "U+0020"),  # as it is after NFKC
    "a wide space": ("a\u3000b", "U+0020"),
    "a line separator": ("a\u2028b", "U+2028"),
    "what becomes a space and a mark": ("a\u00b4", "U+0020"),
    "NUL": ("a\0", "U+0000"),
    "a tab": ("a\t", "U+0009"),
    "a line's end": ("a\n", "U+000A"),
    "delete": ("a\x7f", "U+007F"),
    "a control of Latin-1": ("a\x85", "U+0085"),
    "right to left override": ("a\u202eb", "U+202E"),
    "an isolate": ("a\u2066b", "U+2066"),
    "an Arabic letter mark": ("a\u061cb", "U+061C"),
    "a zero width space": ("a\u200bb", "U+200B"),
    "a zero width joiner": ("a\u200db", "U+200D"),
    "a word joiner": ("a\u2060b", "U+2060"),
    "a soft hyphen": ("a\u00adb", "U+00AD"),
    "a byte order mark": ("\ufeffa", "U+FEFF"),
    "a tag": ("a\U000e0061", "U+E0061"),
    "a grapheme joiner": ("a\u034fb", "U+034F"),
    "a Hangul filler": ("a\u3164", "U+1160"),  # as it is after NFKC
    "a Hangul filler of half the width": ("a\uffa0", "U+1160"),
    "a Hangul filler before": ("\u115fa", "U+115F"),
    "a Khmer vowel that is not shown": ("a\u17b4", "U+17B4"),
    "a Mongolian variation": ("a\u180b", "U+180B"),
    "a variation selector": ("a\ufe0f", "U+FE0F"),
    "a variation selector of the supplement": ("a\U000e0100", "U+E0100"),
    "the last one of the supplement": ("a\U000e01ef", "U+E01EF"),
    "private use": ("a\ue000", "U+E000"),
    "unassigned": ("a\u0378", "U+0378"),
    "never a character": ("a\uffff", "U+FFFF"),
}


@pytest.mark.parametrize("name", NOT_ALLOWED)
def test_what_nobody_can_see_is_not_allowed(name: str) -> None:
    """The refusal says which character it was, and holds nothing else of the login."""
    login, character = NOT_ALLOWED[name]
    with pytest.raises(Invalid) as refused:
        fold_login(login)
    assert refused.value.reason == "LOGIN_NOT_ALLOWED"
    assert refused.value.violations == (("login", f"may not contain {character}"),)


@pytest.mark.parametrize("login", ["alice", "a.b-c_d+e", "alice@example.com", "Zoë", "李雷", "Ольга", "محمد", "🦊", "x';--"])
def test_what_people_are_called_is_allowed(login: str) -> None:
    """Letters of any script, digits, signs."""
    assert fold_login(login)


# META's moment in milliseconds.
NOW_MS = 1_767_323_045_000
LIMIT_MS = NOW_MS + 5 * 60_000

reserved = LoginReserved(login_id="l1", user_id="u1", expires_at_ms=LIMIT_MS)
confirmed = LoginConfirmed(login_id="l1", user_id="u1")
released = LoginReleased(login_id="l1", user_id="u1")
reserve_it = ReserveLogin(login_id="l1", user_id="u1", expires_at_ms=LIMIT_MS)
confirm_it = ConfirmLogin(login_id="l1", user_id="u1")
release_it = ReleaseLogin(login_id="l1", user_id="u1")
other_reserves = ReserveLogin(login_id="l1", user_id="u2", expires_at_ms=LIMIT_MS + 1)
other_reserved = LoginReserved(login_id="l1", user_id="u2", expires_at_ms=LIMIT_MS + 1)
other_confirms = ConfirmLogin(login_id="l1", user_id="u2")
deactivated = UserDeactivated(user_id="u1", login_id="l1")
other_releases = ReleaseLogin(login_id="l1", user_id="u2")

# (what happened, decision, command, the events it gives)
ACCEPTED: dict[str, tuple[list[Any], Any, Any, list[Any]]] = {
    "reserve": ([], reserve, reserve_it, [reserved]),
    "reserve again: nothing": ([reserved], reserve, reserve_it, []),
    "reserve what one has: nothing": ([reserved, confirmed], reserve, reserve_it, []),
    "reserve what was released": ([reserved, released], reserve, other_reserves, [other_reserved]),
    "reserve what was confirmed and released": ([reserved, confirmed, released], reserve, other_reserves, [other_reserved]),
    "confirm": ([reserved], confirm, confirm_it, [confirmed]),
    "confirm again: nothing": ([reserved, confirmed], confirm, confirm_it, []),
    "release the reserved": ([reserved], release, release_it, [released]),
    "release the confirmed": ([reserved, confirmed], release, release_it, [released]),
    "release the free: nothing": ([], release, release_it, []),
    "release again: nothing": ([reserved, released], release, release_it, []),
    "the holder is deactivated": ([reserved, confirmed], release_with_user, deactivated, [released]),
    "a former holder is deactivated: nothing": ([reserved, released, other_reserved], release_with_user, deactivated, []),
    "a stranger releases the reserved: nothing": ([reserved], release, other_releases, []),
    "a stranger releases the confirmed: nothing": ([reserved, confirmed], release, other_releases, []),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    """These commands give exactly these events, or none where nothing changes."""
    history, decide, command, events = ACCEPTED[name]
    given(LOGIN, *history).when(decide, command).then(*events)


# (what happened, decision, command, reason)
REFUSED: dict[str, tuple[list[Any], Any, Any, str]] = {
    "reserve: reserved by another": ([reserved], reserve, other_reserves, "LOGIN_TAKEN"),
    "reserve: confirmed by another": ([reserved, confirmed], reserve, other_reserves, "LOGIN_TAKEN"),
    "confirm: nobody's": ([], confirm, confirm_it, "LOGIN_NOT_HELD"),
    "confirm: another's": ([reserved], confirm, other_confirms, "LOGIN_NOT_HELD"),
    "confirm: another's for good": ([reserved, confirmed], confirm, other_confirms, "LOGIN_NOT_HELD"),
    "confirm: released": ([reserved, released], confirm, confirm_it, "LOGIN_NOT_HELD"),
    "confirm: expired and taken by another": ([reserved, other_reserved], confirm, confirm_it, "LOGIN_NOT_HELD"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """These commands are refused for these reasons."""
    history, decide, command, reason = REFUSED[name]
    given(LOGIN, *history).when(decide, command).then_refused(reason)


def test_a_reservation_holds_to_its_last_millisecond() -> None:
    """A millisecond later it is free for the next; a confirmed login never becomes free by itself."""
    last = replace(META, now=META.now + timedelta(minutes=5))
    after = replace(META, now=last.now + timedelta(milliseconds=1))
    years_after = replace(META, now=META.now + timedelta(days=3650))
    login = given(LOGIN, reserved)
    login.when(reserve, other_reserves, last).then_refused("LOGIN_TAKEN")
    login.when(reserve, other_reserves, after).then(other_reserved)
    given(LOGIN, reserved, confirmed).when(reserve, other_reserves, years_after).then_refused("LOGIN_TAKEN")


def test_who_comes_late_may_still_confirm_if_nobody_else_came() -> None:
    """Expiry makes a login free for others; it takes it from nobody."""
    after = replace(META, now=META.now + timedelta(days=1))
    given(LOGIN, reserved).when(confirm, confirm_it, after).then(confirmed)
    given(LOGIN, reserved).when(reserve, reserve_it, after).then()


def test_the_state_is_the_fold_of_the_events() -> None:
    """Every event of the kind leaves its trace; a new reservation is not confirmed by what its forerunner was."""
    assert given(LOGIN, reserved).state == Login(holder_id="u1", expires_at_ms=LIMIT_MS)
    assert given(LOGIN, reserved, confirmed).state == Login(holder_id="u1", confirmed=True, expires_at_ms=LIMIT_MS)
    assert given(LOGIN, reserved, confirmed, released).state == Login()
    later = given(LOGIN, reserved, confirmed, released, other_reserved).state
    assert later == Login(holder_id="u2", expires_at_ms=LIMIT_MS + 1)
