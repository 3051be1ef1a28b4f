"""Builds the shim when the package is built: one static file, from C, beside its source (cni/shim/)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = [
    *("-std=c11", "-Os", "-s", "-static"),
    *("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wformat=2", "-Werror"),
    *("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2"),
]


class BuildShim(BuildHookInterface):  # type: ignore[type-arg]
    """CC names the compiler; else musl-gcc, whose static files are small and start quickly, else cc."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get("VMTAP_NO_SHIM") == "1":  # a laptop without a compiler: the one-shot does it all
            return
        source = Path(self.root, "cni/shim/vmtap.c")
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
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
        build_data["artifacts"].append("cni/shim/vmtap")
