"""The cache folder, and what an asset in it is: a file or folder whose name tells what it was made from."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lab.process import LabError, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("VMTAP_CACHE") or CHECKOUT / ".cache")

build = partial(run, timeout=None, in_our_group=True)
"""Runs a command that downloads or builds: it may take long, and Ctrl-C ends it."""


class AssetError(LabError):
    """An asset cannot be made or is not there; the text says what to do."""


@dataclass(frozen=True)
class Asset:
    """A file or folder in the cache.

    name: begins its file name; make: makes it at a path that it is given; setup: the word for lab/setup that has it
    made; versions and sources: what it is made from. When one of these changes, the asset is made anew under another
    name; an asset with neither is never out of date.
    """

    name: str
    make: Callable[[Path], None]
    setup: str
    versions: object = None
    sources: Callable[[], Iterable[Path]] = tuple
    suffix: str = ""

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        sources = sorted(self.sources())
        stamp = hashlib.sha256(repr(self.versions).encode() if self.versions else b"")
        for source in sources:
            digest = hashlib.sha256(source.read_bytes()).hexdigest()
            stamp.update(f"{source.relative_to(CHECKOUT)} {digest}\n".encode())
        mark = f"-{stamp.hexdigest()[:12]}" if self.versions or sources else ""
        return CACHE / f"{self.name}{mark}{self.suffix}"

    def get(self) -> Path:
        """Its path. Raises AssetError if it is not there."""
        path = self.path
        if not path.exists():
            raise AssetError(f"{path.name} is not in the cache folder: run lab/setup {self.setup}")
        return path

    def ensure(self) -> Path:
        """Makes it unless it is there. An interrupted or failed run leaves nothing. Raises LabError."""
        path = self.path
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=CACHE) as scratch:
                part = Path(scratch) / "part"
                self.make(part)
                if path != self.path:
                    raise AssetError(
                        f"the sources of {self.name} have changed during the build: run it again"
                    )
                part.rename(path)
        return path
