"""What the emulated machine (lab/hw.py) is made of: a QEMU and a kernel of Debian's backports, and an initramfs.

Downloaded and unpacked into the cache folder, and nothing is installed.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab import assets

BACKPORTS = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
"""A QEMU that emulates an SR-IOV NIC is newer (8.0) than Debian 12's own, and needs none but its libraries."""
KERNEL_PACKAGE = "linux-image-amd64"
"""The cloud kernel has no drivers for such a NIC."""
MODULES = (
    *("9pnet_virtio", "9p", "virtio_net", "igb", "igbvf", "8021q", "bridge", "bonding", "dummy", "veth"),
    *("macvtap", "tun"),
)
"""What hw.init loads, after what they depend on."""
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_INIT = Path(__file__).with_name("hw.init")


@dataclass(frozen=True)
class Hardware:
    """What lab/hw.py boots, and the QEMU that can."""

    qemu: Path
    firmware: tuple[Path, ...]
    """QEMU's -L, each."""
    kernel: Path
    initramfs: Path


def files() -> Hardware:
    """The emulated machine's files; AssetError if they were not made yet."""
    folder = assets.made(_folder(), "test")
    firmware = (folder / "usr/share/qemu", folder / "usr/share/seabios")
    image = assets.made(_image_path(), "test")
    return Hardware(folder / "usr/bin/qemu-system-x86_64", firmware, folder / "vmlinuz", image)


def make() -> None:
    """QEMU and a kernel from Debian's backports, unpacked only; and the initramfs, each if it is not there."""
    folder = _folder()
    if not folder.exists():
        with assets.building(folder) as parts:
            _unpack(parts)
    image = _image_path()
    if not image.exists():
        with assets.building(image) as part:
            part.write_bytes(gzip.compress(_initramfs(folder), compresslevel=6, mtime=0))


def _folder() -> Path:
    return assets.CACHE / "hw"


def _image_path() -> Path:
    stamp = hashlib.sha256(_INIT.read_bytes() + repr(MODULES).encode()).hexdigest()[:12]
    return assets.CACHE / f"hw-{stamp}.cpio.gz"


def _unpack(parts: Path) -> None:
    """The packages as they are, without what nobody reads."""
    if platform.machine() != "x86_64":
        raise assets.AssetError(f"the emulated machine is an x86_64, this one is {platform.machine()}")
    parts.mkdir()
    with tempfile.TemporaryDirectory(prefix="backports.", dir=assets.CACHE) as scratch:
        options = _backports(Path(scratch))
        assets.run(["apt-get", "-q", *options, "update"])
        for package in (*BACKPORTS, assets.real_package(KERNEL_PACKAGE, options)):
            assets.unpack(package, parts, options)
    assets.unpack(assets.BUSYBOX_PACKAGE, parts)
    for kernel in (parts / "boot").glob("vmlinuz-*"):
        kernel.rename(parts / "vmlinuz")
    for needless in ("boot", "usr/share/doc"):
        shutil.rmtree(parts / needless)


def _backports(scratch: Path) -> list[str]:
    """Options for apt to know the backports of this Debian and nothing else, with its lists in scratch."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    known = assets.with_lists(
        ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Component: main"]
    )
    mirrors = [uri for codename, uri in map(str.split, known.splitlines()) if codename == release]
    if not release or not mirrors:
        raise assets.AssetError("apt knows no mirror of this machine's release: is this Debian?")
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
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _initramfs(folder: Path) -> bytes:
    """The emulated machine's first file system; its second is the host's."""
    found = {path.name.split(".")[0]: path for path in (folder / "lib/modules").rglob("*.ko.xz")}
    modules: dict[str, bytes] = {}

    def add(name: str) -> None:
        """A module after those that its .modinfo says it depends on; file names have either kind of dash."""
        path = found.get(name) or found.get(name.replace("_", "-"))
        if path is None:
            raise assets.AssetError(f"{folder} has no module {name}: remove the folder to unpack it again")
        code = lzma.decompress(path.read_bytes())
        depends = re.search(rb"\0depends=([^\0]*)\0", code)
        for other in depends[1].decode().split(",") if depends and depends[1] else ():
            if other not in modules:
                add(other)
        modules[name] = code

    for name in MODULES:
        add(name)
    return assets.cpio(
        {
            **dict.fromkeys(("bin", "dev", "host", "modules", "proc", "sys", "system"), (0o040755, b"")),
            "bin/busybox": (0o100755, (folder / "bin/busybox").read_bytes()),
            "init": (0o100755, _INIT.read_bytes()),
            "modules/order": (0o100644, assets.lines(list(modules))),
            **{f"modules/{name}.ko": (0o100644, code) for name, code in modules.items()},
        }
    )
