"""Generates the Python code of every `.proto` beside it, or checks that what is committed is up to date.

Beside each `.proto` its messages and stubs; in the service that decides on a domain its structs, codecs and command
servicers (`domain_code.py`); for other teams the page of its events (`events_page.py`); for the command line the names of
the summaries (`summary_names.py`). The small domains
of `tests/domains` have their code in a folder each.

Run as `python protos/generate.py [--check | --image FILE]`. `--image` writes a descriptor set for buf, which then
needs no network: the definitions of buf/validate come from the installed protovalidate, google/rpc from
googleapis-common-protos.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from domain_code import domain_files
from domain_contract import NotADomain
from events_page import page
from google.protobuf import any_pb2, descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb
from summary_names import summary_names

HERE = Path(__file__).resolve().parent
TOP = HERE.parent
OURS = ("foldline", "bank")
RULES = Path(HERE.name, "buf", "validate", "validate.binpb")
"""Where the definition of the fields' rules is kept, for a start that needs no protovalidate."""

SMALL = sorted(path.relative_to(TOP) for path in TOP.glob("tests/domains/*/*.proto"))
"""The `.proto` files of the small domains: no part of the contracts, so buf does not see them."""
DOMAINS = {"bank/v1/": "write_service", **{f"{path.parent}/": str(path.parent) for path in SMALL}}
"""Where the domain of the `.proto` files that begin so is decided: the folder of its structs, codecs and servicers."""
EVENTS = Path("docs", "events.md")
"""The page of the events that other teams may follow."""
SUMMARIES = Path("cli", "summaries.py")
"""The names of the summaries."""


def sources() -> list[str]:
    """Every `.proto` of ours, as paths relative to this folder, sorted."""
    return sorted(str(path.relative_to(HERE)) for package in OURS for path in (HERE / package).rglob("*.proto"))


def rules() -> bytes:
    """The definition of buf/validate/validate.proto, as the installed protovalidate has it."""
    return validate_pb.desc().proto.to_binary()


def write_imports(target: Path) -> None:
    """Writes the definitions that ours import and that are installed as packages, as one descriptor set."""
    files = descriptor_pb2.FileDescriptorSet()
    for module in (any_pb2, descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2, code_pb2, error_details_pb2, status_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.add().ParseFromString(rules())
    target.write_bytes(files.SerializeToString())


def protoc_run(files: Iterable[str], imports: Path, *options: str) -> None:
    """Runs protoc over sources; raises SystemExit with its code if it refuses them.

    protoc takes either source folders or descriptor sets, so ours are first compiled with the imports at hand.
    """
    folders = [f"--proto_path={HERE}", f"--proto_path={TOP}", f"--descriptor_set_in={imports}"]
    if code := protoc.main(["protoc", *folders, *options, *files]):
        raise SystemExit(code)


def write_image(target: Path, imports: Path, files: Iterable[str]) -> None:
    """Writes the definitions of sources with all that they import and where each stands in its source."""
    protoc_run(files, imports, "--include_imports", "--include_source_info", f"--descriptor_set_out={target}")


def generate(top: Path, imports: Path) -> set[Path]:
    """Writes all generated files below `top`, as they lie below the project's folder, and returns their paths."""
    (top / RULES).parent.mkdir(parents=True, exist_ok=True)
    (top / RULES).write_bytes(rules())
    scripts = Path(sysconfig.get_path("scripts"))
    small = [str(path) for path in SMALL]
    for files, folder in ((sources(), top / HERE.name), (small, top)):
        protoc_run(
            files,
            imports,
            f"--plugin={scripts / 'protoc-gen-mypy'}",
            f"--plugin={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            f"--mypy_out=quiet:{folder}",
            f"--mypy_grpc_out=quiet,only_async:{folder}",
        )
    image = imports.with_name("image.binpb")
    write_image(image, imports, sources() + small)
    described = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())
    written = []
    for prefix, package in DOMAINS.items():
        for name, text in domain_files(described, prefix, package).items():
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written.append(path)
    (top / EVENTS).parent.mkdir()
    (top / EVENTS).write_text(page(described, next(iter(DOMAINS))))
    (top / SUMMARIES).parent.mkdir()
    (top / SUMMARIES).write_text(summary_names(described, next(iter(DOMAINS))))
    written.append(top / SUMMARIES)
    ruff = [str(scripts / "ruff"), "--quiet", "--config", str(TOP / "pyproject.toml")]
    subprocess.run([ruff[0], "check", "--select", "I", "--fix", *ruff[1:], *map(str, written)], check=True)  # noqa: S603
    subprocess.run([ruff[0], "format", *ruff[1:], *map(str, written)], check=True)  # noqa: S603
    return generated(top)


def generated(top: Path) -> set[Path]:
    """The generated files below `top`, as paths relative to it."""
    patterns = [str(RULES), str(EVENTS), str(SUMMARIES)]
    folders = [*(f"{HERE.name}/{package}/**" for package in OURS), *(str(path.parent) for path in SMALL)]
    patterns += [f"{folder}/*_pb2*.py{end}" for folder in folders for end in ("", "i")]
    for package in DOMAINS.values():
        patterns += [f"{package}/domain/*_types.py", f"{package}/codec/*_codec.py", f"{package}/servicers.py"]
    return {path.relative_to(top) for pattern in patterns for path in top.glob(pattern)}


def main() -> int:
    """Generates in place, checks, or writes buf's image, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the committed code differs from a fresh run")
    parser.add_argument("--image", type=Path, help="write a descriptor set with imports and source positions here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        imports, fresh = Path(folder) / "imports.binpb", Path(folder) / "fresh"
        write_imports(imports)
        if arguments.image:
            write_image(arguments.image, imports, sources())
            return 0
        fresh.mkdir()
        try:
            wanted = generate(fresh, imports)
        except NotADomain as refused:
            print(refused, file=sys.stderr)
            return 1
        different = sorted(name for name in wanted | generated(TOP) if _bytes(fresh / name) != _bytes(TOP / name))
        if arguments.check and different:
            print("out of date, run `make proto`:", *different, sep="\n  ", file=sys.stderr)
            return 1
        for name in different:
            _replace(TOP / name, _bytes(fresh / name))
    return 0


def _bytes(path: Path) -> bytes | None:
    """What a file holds; None if there is none."""
    return path.read_bytes() if path.exists() else None


def _replace(path: Path, content: bytes | None) -> None:
    """Writes a file, or removes it."""
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
