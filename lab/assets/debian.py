"""Debian packages, downloaded and unpacked; nothing is installed. Needs root, as apt-get download does."""

from __future__ import annotations

import platform
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lab.assets.cache import CACHE, AssetError, build
from lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.process import Word

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def unpack(package: str, root: Path, options: Sequence[str] = ()) -> None:
    """Downloads a package and unpacks its files below root. options: apt's, as backports() returns them."""
    with tempfile.TemporaryDirectory(prefix="deb.", dir=CACHE) as scratch:
        download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *options, "download", package]
        _with_lists(download, cwd=Path(scratch))
        for archive in Path(scratch).glob("*.deb"):
            build(["dpkg-deb", "-x", archive, root])


def real_kernel(package: str, options: Sequence[str] = ()) -> str:
    """The package that a meta-package such as linux-image-cloud-amd64 depends on today."""
    depends = _with_lists(["apt-cache", *options, "depends", package])
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if not found:
        raise AssetError(f"apt-cache knows no kernel for {package}: is this Debian?")
    return found[1]


def backports(scratch: Path) -> list[str]:
    """Options that make apt use the backports of this Debian release and nothing else, with its lists in scratch."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    known = _with_lists(["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Component: main"])
    mirrors = [uri for codename, uri in map(str.split, known.splitlines()) if codename == release]
    if not release or not mirrors:
        raise AssetError("apt knows no mirror of this machine's release: is this Debian?")
    sources = scratch / "sources.list"
    sources.write_text(f"deb [signed-by={_KEYRING}] {mirrors[0]} {release}-backports main\n")
    (scratch / "lists/partial").mkdir(parents=True)
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": scratch / "lists",
        "Dir::Cache": scratch,
        "APT::Sandbox::User": "root",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    build(["apt-get", "-q", *options, "update"])
    return options


def _with_lists(argv: Sequence[Word], cwd: Path | None = None) -> str:
    """Runs an apt command. If it fails, updates the package lists, which may be old or missing, and runs it again."""
    try:
        return build(argv, cwd=cwd).stdout
    except LabError:
        build(["apt-get", "-q", "update"])
        return build(argv, cwd=cwd).stdout
