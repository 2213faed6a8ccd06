"""The check that is run before a deployment, where it cannot even begin; with processes in flight: test_evolution.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import saga_service
from saga_service import registry
from saga_service.check import main


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise LookupError('no such step')", "LookupError: no such step"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("PROCESSES = (", "SyntaxError: '(' was never closed"),
        ("", "AttributeError: module 'saga_service.registry' has no attribute 'PROCESSES'"),
    ],
)
def test_code_that_cannot_be_imported_is_no_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str, said: str
) -> None:
    """One sentence and exit code 2, where the interpreter's own 1 would say that processes would not go on."""
    (tmp_path / "registry.py").write_text(code)
    monkeypatch.setattr(saga_service, "__path__", [str(tmp_path)])
    monkeypatch.setattr(saga_service, "registry", registry)  # as it is again afterwards
    monkeypatch.delitem(sys.modules, "saga_service.registry")
    monkeypatch.setenv("FOLDLINE_DATABASE_URL", "postgresql://app@127.0.0.1:1/saga")
    monkeypatch.setattr(sys, "argv", ["check", "--histories", "0"])
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"the code of the processes cannot be imported: {said}")
    assert (printed.out, printed.err.count("\n")) == ("", 1)
