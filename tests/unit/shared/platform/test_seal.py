"""What clients are given and bring back, sealed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.development_keys import seal_keys_in
from shared.platform.seal import NotOurs, Seal
from tests.support.system.sealing import SEAL

OLD, NEW = "0d" * 32, "4e" * 32


@given(st.binary(min_size=1, max_size=200), st.text(max_size=40), st.text(max_size=40))
def test_what_was_sealed_opens_under_its_binding_alone(content: bytes, purpose: str, tenant: str) -> None:
    """The parts of a binding are apart: moved from one into the other they are another binding."""
    text = SEAL.seal(content, purpose, tenant)
    assert SEAL.open(text, purpose, tenant) == content
    for other in ((purpose, tenant + "x"), ("x" + purpose, tenant), (purpose + tenant,), (tenant, purpose, "")):
        with pytest.raises(NotOurs):
            SEAL.open(text, *other)


@pytest.mark.parametrize("text", ["", "x", "!!!!", "é", "AAAA", "A" * 64, "A" * 2000])
def test_what_nobody_sealed_does_not_open(text: str) -> None:
    """Whatever the text."""
    with pytest.raises(NotOurs):
        SEAL.open(text, "acme")


def test_a_changed_character_does_not_open() -> None:
    """Each of them."""
    text = SEAL.seal(b"7", "acme")
    for at, character in enumerate(text):
        with pytest.raises(NotOurs):
            SEAL.open(text[:at] + ("A" if character != "A" else "B") + text[at + 1 :], "acme")


def test_keys_change_without_a_break() -> None:
    """Old and new, then new and old, then new alone: whatever one of two neighbours seals, the other opens."""
    steps = [Seal(OLD), Seal(f"{OLD},{NEW}"), Seal(f"{NEW}, {OLD}"), Seal(NEW)]
    for one, other in pairwise(steps):
        assert one.open(other.seal(b"7", "acme"), "acme") == b"7"
        assert other.open(one.seal(b"7", "acme"), "acme") == b"7"
    with pytest.raises(NotOurs):
        steps[3].open(steps[0].seal(b"7", "acme"), "acme")


@pytest.mark.parametrize("keys", ["", "5e", "zz" * 32, "5e" * 33, f"{OLD},", ",".join([OLD] * 5)])
def test_keys_that_are_none_are_refused(keys: str) -> None:
    """Too short, too long, too many, not hexadecimal."""
    with pytest.raises(ValueError, match="must be 1 to 4 keys of 64 hexadecimal digits"):
        Seal(keys)


def test_of_two_who_make_the_keys_one_wins(tmp_path: Path) -> None:
    """Whoever asks at the same time gets the same file, whole; nothing else is left behind."""
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: seal_keys_in(tmp_path).read_text(), range(8)))
    assert len(found) == 1
    Seal(found.pop().strip())
    assert [file.name for file in tmp_path.iterdir()] == ["seal_keys"]
