"""What a guest (lab/guest.py) boots: Debian's cloud kernel, and an initramfs that runs guest.init."""

from __future__ import annotations

from pathlib import Path

from lab.assets import linux
from lab.assets.cache import Asset

MODULES = {
    "nic": ("virtio_pci", "virtio_net", "virtio_console"),
    "seed": ("virtio_scsi", "sr_mod", "isofs"),
}
"""What guest.init loads for what."""
_INIT = Path(__file__).parents[1] / "guest.init"


def files() -> linux.Boot:
    """The guest's files. Raises AssetError if they are not there."""
    return linux.Boot(KERNEL.get() / "vmlinuz", INITRAMFS.get())


def _make_kernel(folder: Path) -> None:
    folder.mkdir()
    linux.unpack("linux-image-cloud-amd64", folder)


def _make_initramfs(image: Path) -> None:
    image.write_bytes(linux.initramfs(KERNEL.get(), _INIT, MODULES, ("seed", "tmp")))


KERNEL = Asset("guest-linux", _make_kernel, "demo")
INITRAMFS = Asset("guest", _make_initramfs, "demo", MODULES, lambda: [_INIT], ".cpio.gz")
