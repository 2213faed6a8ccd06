"""The bill of materials of the image, as CycloneDX 1.6 in JSON: each Python package that is installed, with version and licence.

`python -m deploy.sbom VERSION` prints it; the image has it as /app/sbom.cdx.json. Debian's packages are in the base image's own.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from typing import Any


def bill(version: str, installed: Iterable[Distribution]) -> dict[str, Any]:
    """The document, for a version of Foldline; the same packages give the same bytes."""
    components = sorted((_component(each) for each in installed), key=lambda it: str(it["purl"]))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "foldline", "version": version}},
        "components": components,
    }


def _component(package: Distribution) -> dict[str, Any]:
    name = re.sub(r"[-_.]+", "-", package.name).lower()
    purl = f"pkg:pypi/{name}@{package.version}"
    found: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": package.version, "purl": purl}
    told = package.metadata
    if "License-Expression" in told:
        found["licenses"] = [{"expression": told["License-Expression"]}]
    elif "License" in told and told["License"] and "\n" not in told["License"]:
        found["licenses"] = [{"license": {"name": told["License"]}}]
    return found


def main() -> None:
    """Prints the bill of the environment that runs it."""
    parser = argparse.ArgumentParser(prog="python -m deploy.sbom", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("version", help="the release of Foldline")
    print(json.dumps(bill(parser.parse_args().version, distributions()), indent=1))


if __name__ == "__main__":
    main()
