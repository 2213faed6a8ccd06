"""What mypy says about rows that do not fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FILES = [Path(__file__).with_name(service) / "wrong_rows.py" for service in ("write_service", "read_service")]
TOP = Path(__file__).parents[2]


def test_the_type_checker_refuses_each_wrong_row_and_no_other() -> None:
    """A row whose state, command, event, fold, id, roles or message do not fit each other never gets into a service."""
    asked = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "--no-pretty", *map(str, FILES)]
    told = subprocess.run(asked, cwd=TOP, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    assert told.stderr == ""
    for file in FILES:
        name = re.escape(str(file.relative_to(TOP)))
        refused = {int(found[1]) for found in re.finditer(rf"^{name}:(\d+): error: ", told.stdout, re.MULTILINE)}
        lines = file.read_text().splitlines()
        wrong = {number for number, line in enumerate(lines, start=1) if line.endswith("# wrong")}
        assert len(wrong) >= 10
        assert {lines[number - 1].strip() for number in wrong - refused} == set()
        assert {lines[number - 1].strip() for number in refused - wrong} == set(), told.stdout
