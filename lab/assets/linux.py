"""What QEMU boots: the kernel of a Debian package, and an initramfs of busybox, an init script and kernel modules."""

from __future__ import annotations

import gzip
import lzma
import platform
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.assets import debian
from lab.assets.cache import AssetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_BUSYBOX = "busybox-static"
_FILE, _PROGRAM, _FOLDER = 0o100644, 0o100755, 0o040755


@dataclass(frozen=True)
class Boot:
    """The files that QEMU boots."""

    kernel: Path
    initramfs: Path


def unpack(package: str, root: Path, options: Sequence[str] = ()) -> None:
    """Unpacks a kernel below root: vmlinuz, lib/modules, and bin/busybox. package: a meta-package of kernels."""
    if platform.machine() != "x86_64":
        raise AssetError(f"the lab's virtual machines are for x86_64, this machine is {platform.machine()}")
    debian.unpack(debian.real_kernel(package, options), root, options)
    debian.unpack(_BUSYBOX, root)
    for kernel in (root / "boot").glob("vmlinuz-*"):
        kernel.rename(root / "vmlinuz")
    for unused in ("boot", "usr/share/doc"):
        shutil.rmtree(root / unused)


def initramfs(root: Path, init: Path, orders: Mapping[str, Sequence[str]], folders: Sequence[str]) -> bytes:
    """A compressed initramfs of a kernel that was unpacked below root.

    orders: name → the modules that init loads by /modules/NAME.order, a list of all of them and of those that they
    depend on, none twice. folders: empty folders for init, beside bin, dev, modules, proc and sys.
    """
    found = {path.name.split(".")[0]: path for path in (root / "lib/modules").rglob("*.ko*")}
    modules: dict[str, bytes] = {}

    def add(name: str) -> None:
        """A module, after those in the field "depends" of its .modinfo; file names have either kind of dash."""
        if name in modules:
            return
        path = found.get(name) or found.get(name.replace("_", "-"))
        if path is None:
            raise AssetError(f"{root} has no module {name}: remove the folder to unpack it again")
        code = path.read_bytes()
        if path.suffix == ".xz":
            code = lzma.decompress(code)
        depends = re.search(rb"\0depends=([^\0]*)\0", code)
        for other in depends[1].decode().split(",") if depends and depends[1] else ():
            add(other)
        modules[name] = code

    lists = {}
    for order, names in orders.items():
        before = len(modules)
        for name in names:
            add(name)
        lists[f"modules/{order}.order"] = "".join(f"{name}\n" for name in [*modules][before:]).encode()
    archive = _cpio(
        {
            **dict.fromkeys(("bin", "dev", "modules", "proc", "sys", *folders), (_FOLDER, b"")),
            "bin/busybox": (_PROGRAM, (root / "bin/busybox").read_bytes()),
            "init": (_PROGRAM, init.read_bytes()),
            **{name: (_FILE, data) for name, data in lists.items()},
            **{f"modules/{name}.ko": (_FILE, code) for name, code in modules.items()},
        }
    )
    return gzip.compress(archive, compresslevel=6, mtime=0)


def _cpio(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A newc archive of name → (mode, data); the kernel's driver-api/early-userspace/buffer-format.rst."""
    archive = bytearray()
    for number, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], start=1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
