"""Builds what the package's sources do not have as it is used: the shim, one static file, from C, beside its source
(cni/shim/), and the stubs of each .proto, beside it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = [
    *("-std=c11", "-Os", "-s", "-static"),
    *("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wformat=2", "-Werror"),
    *("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2"),
]


class Build(BuildHookInterface):  # type: ignore[type-arg]
    """Of a wheel, and of an editable install (version "editable"), which has the lab's stubs as well."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        protos = [*root.glob("cni/**/*.proto")]
        if version == "editable":
            protos += root.glob("lab/proto/*.proto")
        stubs(root, [str(path.relative_to(root)) for path in protos])
        build_data["artifacts"].append("cni/**/*_pb2*.py*")
        if os.environ.get("VMTAP_NO_SHIM") != "1":  # on a laptop without a compiler the one-shot does it all
            shim(root)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{platform.machine()}"
            build_data["artifacts"].append("cni/shim/vmtap")


def stubs(root: Path, protos: list[str]) -> None:
    """X_pb2.py, X_pb2.pyi and X_pb2_grpc.py for each X.proto; they import each other by their path from the root."""
    outputs = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={root}", *outputs]
    subprocess.run([*command, *protos], check=True, cwd=root)


def shim(root: Path) -> None:
    """CC names the compiler; else musl-gcc, whose static files are small and start quickly, else cc."""
    source = root / "cni/shim/vmtap.c"
    target = source.with_name("vmtap")
    compiler = os.environ.get("CC") or shutil.which("musl-gcc") or shutil.which("cc")
    if not compiler:
        raise RuntimeError(
            "the shim is C: install a compiler (Debian: apt-get install musl-tools gcc), or set VMTAP_NO_SHIM=1 "
            "to leave it out, where no agent is wanted"
        )
    made = target.with_suffix(".new")
    subprocess.run([compiler, *FLAGS, "-o", made, source], check=True)
    made.rename(target)
