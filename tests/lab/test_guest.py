"""A guest that cannot start says why, and its image holds what its init expects."""

from __future__ import annotations

import gzip
import os
import subprocess

import pytest

from lab.assets import guest as assets
from lab.guest import Conversation, Guest, GuestError, Image
from lab.wire import Netns


@pytest.mark.vm
def test_a_launcher_that_fails_is_quoted() -> None:
    with Image() as image, Netns("pod") as pod, Guest(image, pod.path, []) as guest:
        with pytest.raises(
            GuestError, match=r"the guest has ended; its output ends with: vmtap-launch: .*no attachment"
        ):
            guest.ready()
        with pytest.raises(GuestError, match="the guest has ended"):
            guest.run("true")


class Cut(Conversation):
    """A guest that answers what it is given, and ends."""

    def __init__(self, said: bytes) -> None:
        super().__init__()
        answers, there = os.pipe()
        self._listen(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"), os.fdopen(answers))
        self.answer = self.ask("true")
        os.write(there, said)
        os.close(there)

    def close(self) -> None:
        self._reader.join()
        self._commands.close()

    def _tail(self) -> str:
        return ""


@pytest.mark.parametrize("said", [b"", b"rea", b"ready\n1", b"ready\n1 0 dHJ1"])
def test_a_guest_that_was_killed_in_the_midst_of_an_answer_has_ended(said: bytes) -> None:
    with Cut(said) as guest, pytest.raises(GuestError, match="the guest has ended"):
        guest.answer()


def test_the_initramfs_is_an_archive_that_cpio_reads() -> None:
    image = gzip.decompress(assets.files().initramfs.read_bytes())
    busybox = assets.files().kernel.with_name("bin") / "busybox"
    listed = subprocess.run([busybox, "cpio", "-t"], input=image, capture_output=True, check=True)
    names = listed.stdout.decode().split()
    assert {"init", "bin/busybox", "modules/nic.order", "modules/virtio_net.ko"} <= set(names)
