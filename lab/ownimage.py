"""The project's images, built from its Dockerfile on this machine, as archives that `ctr images import` takes.

    python -m lab.ownimage     builds them into the cache folder, if they are not there, and says where and how large

No registry: a base image made by debootstrap stands in for the Dockerfile's, and buildah builds in a chroot, which
needs no container runtime. Making needs root on Debian, with buildah and debootstrap; lab/setup cluster installs them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.assets import CACHE, CHECKOUT, AssetError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERSION: str = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
NAMES = {"agent": f"ghcr.io/vmtap/vmtap:{VERSION}", "launcher": f"ghcr.io/vmtap/vmtap-launcher:{VERSION}"}
"""By the Dockerfile's target, as the manifests name them."""

_SUITE = "bookworm"
_INCLUDE = "ca-certificates,python3,python3-venv"
"""What the Dockerfile asks of its base, and what pip needs to speak TLS."""
_BASE = "localhost/vmtap-base"
_CERTIFICATES = "/etc/ssl/certs"
_SOURCES = ("Dockerfile", ".dockerignore", "pyproject.toml", "hatch_build.py", "requirements.lock")
_GENERATED = ("_pb2", "__pycache__", "shim/vmtap.new")


@dataclass(frozen=True)
class Images:
    """Archives of the format docker-archive, each with the image's name in it."""

    agent: Path
    launcher: Path


def images() -> Images:
    """The archives; AssetError if they were not built from the sources as they are now."""
    folder = _folder()
    if not folder.exists():
        raise AssetError(f"{folder} is not there: run python -m lab.ownimage, or lab/setup cluster")
    return _in(folder)


def make() -> Images:
    """Build what is not there. Older builds are removed: they are large, and made again in a minute or two."""
    folder = _folder()
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        base = _base()
        with tempfile.TemporaryDirectory(prefix="image.", dir=CACHE) as scratch, _storage() as buildah:
            _import(buildah, base)
            for target, name in NAMES.items():
                _build(buildah, target, name, Path(scratch) / "parts")
            if folder != _folder():
                raise AssetError("the sources were changed meanwhile: again, please")
            (Path(scratch) / "parts").rename(folder)
        for old in CACHE.glob("image-*"):
            if old != folder:
                shutil.rmtree(old)
    return _in(folder)


def _in(folder: Path) -> Images:
    return Images(folder / "agent.tar", folder / "launcher.tar")


def _folder() -> Path:
    stamp = hashlib.sha256(f"{_SUITE} {_INCLUDE}".encode())
    sources = [CHECKOUT / name for name in _SOURCES] + [CHECKOUT / "deploy/requirements.lock"]
    sources += (path for path in (CHECKOUT / "cni").rglob("*") if path.is_file())
    for path in sorted(sources):
        name = str(path.relative_to(CHECKOUT))
        if name != "cni/shim/vmtap" and not any(word in name for word in _GENERATED):
            stamp.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return CACHE / f"image-{stamp.hexdigest()[:12]}"


def _base() -> Path:
    """The base image's files as a tar archive: Debian's minimal system and Python."""
    archive = CACHE / f"base-{_SUITE}-{hashlib.sha256(_INCLUDE.encode()).hexdigest()[:8]}.tar"
    if not archive.exists():
        with tempfile.TemporaryDirectory(prefix="base.", dir=CACHE) as scratch:
            root, part = Path(scratch) / "root", Path(scratch) / "part"
            _run(["debootstrap", "--variant=minbase", f"--include={_INCLUDE}", _SUITE, root])
            for left in (root / "var/cache/apt/archives", root / "var/lib/apt/lists"):
                for file in left.glob("*.*"):
                    file.unlink()
            _run(["tar", "--numeric-owner", "--exclude=./dev/*", "-C", root, "-cf", part, "."])
            part.rename(archive)
    return archive


@contextlib.contextmanager
def _storage() -> Iterator[list[str]]:
    """buildah's command with a storage of its own, which goes with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="buildah.", dir=CACHE) as folder:
        # Its mounts are in a namespace of each command, and end with it.
        command = ["unshare", "--mount", "buildah", f"--root={folder}/root", f"--runroot={folder}/run"]
        # Where the cache is on an overlay itself, as in a container, every layer has to be a copy.
        driver = "--storage-driver=overlay"
        try:
            _run([*command, driver, "from", "scratch"])
        except AssetError:
            driver = "--storage-driver=vfs"
        yield [*command, driver]


def _import(buildah: Sequence[str], base: Path) -> None:
    container = _run([*buildah, "from", "scratch"]).strip()
    _run([*buildah, "add", container, base])
    _run([*buildah, "commit", "--rm", container, _BASE])


def _build(buildah: Sequence[str], target: str, name: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    _run(
        [
            *(*buildah, "bud", "--isolation=chroot", "--pull-never", f"--build-arg=BASE={_BASE}"),
            "--layers",  # the second target finds the first stage done
            # The machine's certificates, where it has some of its own.
            *(f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro", f"--target={target}", f"--tag={name}", "."),
        ]
    )
    _run([*buildah, "push", name, f"docker-archive:{folder}/{target}.tar:{name}"])


def _run(argv: Sequence[str | Path]) -> str:
    try:
        done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise AssetError(f"{argv[0]} is not installed: run lab/setup cluster") from error
    if done.returncode != 0:
        raise AssetError(
            f"{' '.join(map(str, argv))}: exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def main() -> int:
    if os.geteuid():
        print("lab.ownimage: debootstrap and buildah need root here", file=sys.stderr)
        return 1
    try:
        made = make()
    except AssetError as error:
        print(f"lab.ownimage: {error}", file=sys.stderr)
        return 1
    for path in (made.agent, made.launcher):
        print(f"{path}  {path.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
