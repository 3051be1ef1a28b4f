"""A guest that cannot start says why, and its image holds what its init expects."""

from __future__ import annotations

import gzip
import subprocess

import pytest

from lab import assets
from lab.guest import Guest, GuestError, Image
from lab.wire import Netns


@pytest.mark.vm
def test_a_launcher_that_fails_is_quoted() -> None:
    with Image() as image, Netns("pod") as pod, Guest(image, pod.path, []) as guest:
        with pytest.raises(GuestError, match=r"the guest has ended; it said: vmtap-launch: .*no attachment"):
            guest.ready()
        with pytest.raises(GuestError, match="the guest has ended"):
            guest.run("true")


def test_the_initramfs_is_an_archive_that_cpio_reads() -> None:
    image = gzip.decompress(assets.guest().initramfs.read_bytes())
    busybox = assets.guest().kernel.with_name("busybox")
    listed = subprocess.run([busybox, "cpio", "-t"], input=image, capture_output=True, check=True)
    names = listed.stdout.decode().split()
    assert {"init", "bin/busybox", "modules/nic.order", "modules/virtio_net.ko"} <= set(names)
