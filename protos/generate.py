"""Generates the Python code of every `.proto` beside it, or checks that what is committed is up to date.

Run as `python protos/generate.py [--check | --image FILE]`. `--image` writes a descriptor set for buf, which then
needs no network: the definitions of buf/validate come from the installed protovalidate, google/rpc from
googleapis-common-protos.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import sysconfig
import tempfile
from pathlib import Path

from google.protobuf import any_pb2, descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb

HERE = Path(__file__).resolve().parent
OURS = ("foldline", "bank")


def sources() -> list[str]:
    """Every `.proto` of ours, as paths relative to this folder, sorted."""
    return sorted(str(path.relative_to(HERE)) for package in OURS for path in (HERE / package).rglob("*.proto"))


def write_imports(target: Path) -> None:
    """Writes the definitions that ours import and that are installed as packages, as one descriptor set."""
    files = descriptor_pb2.FileDescriptorSet()
    for module in (any_pb2, descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2, code_pb2, error_details_pb2, status_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    target.write_bytes(files.SerializeToString())


def protoc_run(*options: str) -> None:
    """Runs protoc over our sources; raises SystemExit with its code if it refuses them.

    protoc takes either source folders or descriptor sets, so ours are first compiled with the imports at hand.
    """
    if code := protoc.main(["protoc", *options, *sources()]):
        raise SystemExit(code)


def generate(target: Path, imports: Path) -> None:
    """Writes messages, stubs for grpc.aio and their types of every source below `target`."""
    scripts = Path(sysconfig.get_path("scripts"))
    protoc_run(
        f"--plugin={scripts / 'protoc-gen-mypy'}",
        f"--plugin={scripts / 'protoc-gen-mypy_grpc'}",
        f"--proto_path={HERE}",
        f"--descriptor_set_in={imports}",
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--mypy_grpc_out=quiet,only_async:{target}",
    )


def generated(root: Path) -> set[Path]:
    """The generated files below `root`, as paths relative to it."""
    return {
        path.relative_to(root)
        for package in OURS
        for pattern in ("*_pb2*.py", "*_pb2*.pyi")
        for path in (root / package).rglob(pattern)
    }


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
            protoc_run(
                f"--proto_path={HERE}",
                f"--descriptor_set_in={imports}",
                "--include_imports",
                "--include_source_info",
                f"--descriptor_set_out={arguments.image}",
            )
            return 0
        if not arguments.check:
            generate(HERE, imports)
            return 0
        fresh.mkdir()
        generate(fresh, imports)
        names = generated(fresh) | generated(HERE)
        _, different, missing = filecmp.cmpfiles(fresh, HERE, [str(name) for name in names], shallow=False)
        if different or missing:
            print("out of date, run `make proto`:", *sorted(different + missing), sep="\n  ", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
