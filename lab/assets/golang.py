"""Go modules: their files, and programs built from them without cgo. Needs Go 1.24, which it gets if there is none."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab.assets.cache import CACHE, build
from lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OLDEST = (1, 24)
_LOCK = Path(__file__).with_name("go.lock")
_ENV = {
    **os.environ,
    "CGO_ENABLED": "0",
    "GOPATH": str(CACHE / "go"),
    "GOCACHE": str(CACHE / "go-build"),
    "GOFLAGS": "-trimpath -modcacherw",
    "GOTOOLCHAIN": "local",
    "GOWORK": "off",
}
_LATE = re.compile(
    r"time(d )?out|deadline exceeded|connection re(set|fused)|EOF|\b(429|50[0234])\b|temporary failure", re.I
)
"""Errors of a module proxy that may not occur the next time."""
_PAUSES = (2.0, 10.0, 30.0)


def install(packages: Sequence[str], folder: Path, *flags: str) -> None:
    """Builds programs, each named as package@version, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _go("install", *flags, *packages, env={**_ENV, "GOBIN": str(folder)})


def files(module: str) -> Path:
    """The folder with the files of a module, named as module@version."""
    return Path(json.loads(_go("mod", "download", "-json", module, cwd=CACHE))["Dir"])


def build_replaced(module: str, programs: Sequence[str], folder: Path, flags: str = "") -> None:
    """Builds programs of a module that `go install` refuses, because its go.mod replaces other modules.

    What it replaces by folders of its own repository is published as modules, too: v1.34.4 of Kubernetes goes with
    v0.34.4 of each. So a module of ours requires the one and replaces the others. programs: each a folder below the
    module's cmd, or "." for the module itself; flags: further linker flags.
    """
    path, version = module.split("@")
    with tempfile.TemporaryDirectory(prefix="gobuild.", dir=CACHE) as here:

        def go(*words: str) -> str:
            return _go(*words, cwd=Path(here))

        go("mod", "init", "lab")
        file = json.loads(go("mod", "download", "-json", module))["GoMod"]
        replaced = json.loads(go("mod", "edit", "-json", file)).get("Replace") or ()
        staged = [each["Old"]["Path"] for each in replaced if each["New"]["Path"].startswith("./staging/")]
        same = version.replace("v1.", "v0.", 1)
        go("mod", "edit", f"-require={module}", *(f"-replace={name}={name}@{same}" for name in staged))
        packages = [path if name == "." else f"{path}/cmd/{name}" for name in programs]
        go("build", "-mod=mod", f"-ldflags=-s -w {flags}", "-o", f"{folder}/", *packages)


def _program() -> str:
    """The machine's Go if it is new enough, else the one of go.lock, which is installed beside this Python."""
    own = Path(sys.executable).with_name("go")
    for candidate in (shutil.which("go"), own):
        if candidate and Path(candidate).exists():
            version = re.search(r"go(\d+)\.(\d+)", build([candidate, "version"]).stdout)
            if version and (int(version[1]), int(version[2])) >= OLDEST:
                return str(candidate)
    build([sys.executable, "-m", "pip", "install", "-q", "--require-hashes", "-r", _LOCK])
    return str(own)


def _go(*words: str, env: Mapping[str, str] = _ENV, cwd: Path | None = None) -> str:
    """The output of Go. Runs it again if its module proxy is late: what it has downloaded by then, it keeps."""
    argv = [_program(), *words]
    for pause in _PAUSES:
        try:
            return build(argv, env=env, cwd=cwd).stdout
        except LabError as error:
            if not _LATE.search(str(error)):
                raise
        time.sleep(pause)
    return build(argv, env=env, cwd=cwd).stdout
