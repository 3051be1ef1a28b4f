"""What the emulated machine (lab/hw.py) is made of: a QEMU and a kernel of Debian's backports, and an initramfs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.assets import debian, linux
from lab.assets.cache import CACHE, Asset

BACKPORTS = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
"""QEMU emulates an SR-IOV NIC since 8.0; Debian 12's own is older. The libraries of Debian 12 are enough for it."""
MODULES = {
    "boot": (
        *("9pnet_virtio", "9p", "virtio_net", "igb", "igbvf", "8021q", "bridge", "bonding", "dummy", "veth"),
        *("macvtap", "tun", "ipvlan", "sch_ingress", "cls_u32", "act_mirred"),
        # nf_tables needs the first, and does not say so.
        *("crc32c_generic", "nf_tables", "nft_limit", "sch_tbf"),
    )
}
"""What hw.init loads."""
_INIT = Path(__file__).parents[1] / "hw.init"


@dataclass(frozen=True)
class Hardware:
    """A QEMU with an SR-IOV NIC, and what it boots."""

    qemu: Path
    firmware: tuple[Path, ...]
    """The folders of QEMU's option -L."""
    boot: linux.Boot


def files() -> Hardware:
    """The emulated machine's files. Raises AssetError if they are not there."""
    folder = QEMU.get()
    firmware = (folder / "usr/share/qemu", folder / "usr/share/seabios")
    boot = linux.Boot(folder / "vmlinuz", INITRAMFS.get())
    return Hardware(folder / "usr/bin/qemu-system-x86_64", firmware, boot)


def _make_qemu(folder: Path) -> None:
    """The packages as they are, and a kernel with drivers for such a NIC, which the cloud kernel lacks."""
    folder.mkdir()
    with tempfile.TemporaryDirectory(prefix="backports.", dir=CACHE) as scratch:
        options = debian.backports(Path(scratch))
        for package in BACKPORTS:
            debian.unpack(package, folder, options)
        linux.unpack("linux-image-amd64", folder, options)


def _make_initramfs(image: Path) -> None:
    image.write_bytes(linux.initramfs(QEMU.get(), _INIT, MODULES, ("host", "system")))


QEMU = Asset("hw", _make_qemu, "test")
INITRAMFS = Asset("hw", _make_initramfs, "test", MODULES, lambda: [_INIT], ".cpio.gz")
