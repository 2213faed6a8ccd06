"""Variables that nothing of this release knows: a slip in a name must not look like a setting that holds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from shared.platform.variables import KNOWN

PREFIX = "FOLDLINE_"


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each FOLDLINE_* variable that no process or command of this release knows, with the nearest one known."""
    sentences = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1)
            sentences.append(f"{name} is no setting" + (f": did you mean {near[0]}?" if near else ", nor near one"))
    return sentences
