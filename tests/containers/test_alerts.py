"""The alert rules, evaluated by Prometheus over made-up numbers: none fires on a healthy system, each on what it is for.

The other tests evaluate them, and what the dashboard asks, by a part of PromQL of our own; it is held to Prometheus here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.containers.alert_cases import CASES, QUERIES, case, told
from tests.containers.engine import Podman
from tests.containers.images import ROOT, Images

pytestmark = pytest.mark.containers
OBSERVE = ROOT / "deploy/observe"


def test_each_alert_fires_on_what_it_is_for(podman: Podman, images: Images, tmp_path: Path) -> None:
    """And nothing else fires then. Of each query it says what is said of it without it."""
    tests = [told(QUERIES), *(case(number, *each) for number, each in enumerate(CASES))]
    folder = tmp_path / "cases"
    folder.mkdir()
    (folder / "cases.yaml").write_text(
        json.dumps({"rule_files": ["/observe/alerts.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    folder.chmod(0o755)  # the program runs under an account of its own
    mounts = [part for source, target in ((OBSERVE, "/observe"), (folder, "/cases")) for part in ("-v", f"{source}:{target}:ro")]
    podman("run", "--rm", "--entrypoint", "promtool", *mounts, images.prometheus, "test", "rules", "/cases/cases.yaml")
