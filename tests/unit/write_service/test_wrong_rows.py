"""What mypy says about rows that do not fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROWS = Path(__file__).with_name("wrong_rows.py")
TOP = ROWS.parents[3]


def test_the_type_checker_refuses_each_wrong_row_and_no_other() -> None:
    """A row whose state, command, event, id, roles or message do not fit each other never gets into the service."""
    asked = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "--no-pretty", str(ROWS)]
    told = subprocess.run(asked, cwd=TOP, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603
    assert told.stderr == ""
    refused = {int(found[1]) for found in re.finditer(rf"^\S*{ROWS.name}:(\d+): error: ", told.stdout, re.MULTILINE)}
    lines = ROWS.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, start=1) if line.endswith("# wrong")}
    assert len(wrong) > 20
    assert {lines[number - 1].strip() for number in wrong - refused} == set()
    assert {lines[number - 1].strip() for number in refused - wrong} == set(), told.stdout
