"""The project's images, built from its Dockerfile on this machine, as archives that `ctr images import` takes.

There is no registry: a base image made by debootstrap stands in for the Dockerfile's, and buildah builds in a chroot,
which needs no container runtime. Making needs root on Debian, with buildah and debootstrap.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from lab.assets.cache import CACHE, CHECKOUT, Asset, build
from lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERSION: str = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
NAMES = {"agent": f"ghcr.io/vmtap/vmtap:{VERSION}", "launcher": f"ghcr.io/vmtap/vmtap-launcher:{VERSION}"}
"""By the Dockerfile's target, as the manifests name them."""

_SUITE = "bookworm"
_INCLUDE = "ca-certificates,python3,python3-venv"
"""The packages that the Dockerfile needs in its base, and those that pip needs for TLS."""
_BASE = "localhost/vmtap-base"
_CERTIFICATES = "/etc/ssl/certs"
_SOURCES = ("Dockerfile", ".dockerignore", "pyproject.toml", "hatch_build.py", "requirements.lock")
_GENERATED = ("_pb2", "__pycache__", "shim/vmtap.new")


def archives() -> dict[str, Path]:
    """Name of an image → its archive, of the format docker-archive. Raises AssetError if they are not there."""
    folder = IMAGES.get()
    return {name: folder / f"{target}.tar" for target, name in NAMES.items()}


def _sources() -> Iterator[Path]:
    yield from (CHECKOUT / name for name in (*_SOURCES, "deploy/requirements.lock"))
    for path in (CHECKOUT / "cni").rglob("*"):
        name = str(path.relative_to(CHECKOUT))
        if path.is_file() and name != "cni/shim/vmtap" and not any(word in name for word in _GENERATED):
            yield path


def _make_base(archive: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="root.", dir=CACHE) as root:
        Path(root).chmod(0o755)
        build(["debootstrap", "--variant=minbase", f"--include={_INCLUDE}", _SUITE, root])
        for needless in ("var/cache/apt/archives", "var/lib/apt/lists"):
            for file in Path(root, needless).glob("*.*"):
                file.unlink()
        build(["tar", "--numeric-owner", "--exclude=./dev/*", "-C", root, "-cf", archive, "."])


def _make_images(folder: Path) -> None:
    """Removes older builds first: they are large, and made again in a minute or two."""
    for old in CACHE.glob("image-*"):
        if old not in folder.parents:
            shutil.rmtree(old)
    base = BASE.ensure()
    folder.mkdir()
    with _storage() as buildah:
        container = _run([*buildah, "from", "scratch"]).strip()
        _run([*buildah, "add", container, str(base)])
        _run([*buildah, "commit", "--rm", container, _BASE])
        for target, name in NAMES.items():
            _run(
                [
                    *(*buildah, "bud", "--isolation=chroot", "--pull-never", f"--build-arg=BASE={_BASE}"),
                    "--layers",  # the second target finds the first stage done
                    # The machine's certificates, where it has some of its own.
                    *(
                        f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro",
                        f"--target={target}",
                        f"--tag={name}",
                        ".",
                    ),
                ]
            )
            _run([*buildah, "push", name, f"docker-archive:{folder}/{target}.tar:{name}"])


@contextlib.contextmanager
def _storage() -> Iterator[list[str]]:
    """buildah's command line with a storage of its own, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="buildah.", dir=CACHE) as folder:
        # Its mounts are in a namespace of each command, and end with it.
        command = ["unshare", "--mount", "buildah", f"--root={folder}/root", f"--runroot={folder}/run"]
        # Where the cache is on an overlay itself, as in a container, every layer has to be a copy.
        driver = "--storage-driver=overlay"
        try:
            _run([*command, driver, "from", "scratch"])
        except LabError:
            driver = "--storage-driver=vfs"
        yield [*command, driver]


def _run(argv: Sequence[str]) -> str:
    return build(argv, cwd=CHECKOUT).stdout


BASE = Asset(f"base-{_SUITE}", _make_base, "cluster", (_SUITE, _INCLUDE), suffix=".tar")
"""The base image's files: Debian's minimal system and Python."""
IMAGES = Asset("image", _make_images, "cluster", (_SUITE, _INCLUDE), _sources)
