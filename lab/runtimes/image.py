"""Container images of files of this machine: one layer, in an archive of the format docker-archive.

There is no registry and no base image: a program is added with the shared libraries that ldd(1) lists. Must not know
which runtime imports it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import cni
from lab.assets.guest import files as guest_files
from lab.process import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BUSYBOX = Path("/bin/busybox")
"""The static one of the package busybox-static."""
QEMU = Path("/usr/bin/qemu-system-x86_64")
_QEMUS = (
    "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/lib/ipxe/qemu/efi-virtio.rom",
)
_UNUSED = re.compile(r"/(config-[^/]*|test|lib2to3|pydoc_data|idlelib|ensurepip|__pycache__)(/|$)")
"""Files of Python's library that are left out; a static libpython is 25 of its 50 MB."""

_LAUNCHER = """#!{python}
import sys
from cni.launcher.__main__ import main
sys.exit(main())
"""
_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}


def busybox(target: Path, name: str) -> None:
    """Writes an image of busybox with a shell. Its command is `sleep infinity`, as a sandbox needs it."""
    write(
        target,
        name,
        {"bin/busybox": BUSYBOX, "bin/sh": "/bin/busybox"},
        ["/bin/busybox", "sleep", "infinity"],
    )


def machine(target: Path, name: str) -> None:
    """Writes an image for VMs: vmtap-launch, QEMU, a guest's kernel and initramfs in /guest, and a shell."""
    guest = guest_files()
    python = Path(sys.executable).resolve()
    package = Path(cni.__file__).parent
    tree: dict[str, Path | bytes | str] = {
        "bin/busybox": BUSYBOX,
        "bin/sh": "/bin/busybox",
        "guest/initramfs": guest.initramfs,
        "guest/vmlinuz": guest.kernel,
        "usr/bin/vmtap-launch": _LAUNCHER.format(python=python).encode(),
    }
    library = Path(sysconfig.get_path("stdlib"))
    files = [QEMU, python, *map(Path, _QEMUS)]
    files += (path for path in library.rglob("*") if path.is_file() and not _UNUSED.search(str(path)))
    for path in {*files, *libraries(QEMU), *libraries(python)}:
        tree[str(path).lstrip("/")] = path
    for path in package.rglob("*.py"):
        tree[f"{library}/{path.relative_to(package.parent)}".lstrip("/")] = path
    write(target, name, tree, ["/bin/sh"])


def libraries(program: Path) -> Iterator[Path]:
    listed = run(["ldd", program]).stdout
    return (Path(found) for found in re.findall(r"(/\S+) \(0x", listed))


def write(target: Path, name: str, tree: Mapping[str, Path | bytes | str], entrypoint: list[str]) -> None:
    """Writes an image to target.

    name: the image's, with registry and tag. tree: path in the image → a file of this machine, the text of an
    executable (bytes), or the target of a symbolic link (str).
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for folder in sorted({str(parent) for path in tree for parent in Path(path).parents} - {"."}):
            archive.addfile(_entry(folder, tarfile.DIRTYPE))
        for path, source in sorted(tree.items()):
            if isinstance(source, str):
                archive.addfile(_entry(path, tarfile.SYMTYPE, link=source))
                continue
            data = source if isinstance(source, bytes) else source.read_bytes()
            executable = isinstance(source, bytes) or os.access(source, os.X_OK)
            archive.addfile(
                _entry(path, mode=0o755 if executable else 0o644, size=len(data)), io.BytesIO(data)
            )
    config = {
        "architecture": _ARCHITECTURE[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(target, "w") as archive:
        for path, data in {
            "manifest.json": json.dumps(manifest).encode(),
            "config.json": json.dumps(config).encode(),
            "layer.tar": layer.getvalue(),
        }.items():
            archive.addfile(_entry(path, size=len(data)), io.BytesIO(data))


def _entry(
    path: str, kind: bytes = tarfile.REGTYPE, *, mode: int = 0o755, size: int = 0, link: str = ""
) -> tarfile.TarInfo:
    """An entry of root's with no time, so that equal files make equal images."""
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, size, link
    return entry
