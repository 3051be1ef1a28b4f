"""netns.py: what is taken for a pod's namespace, and that the calling thread always comes back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cni.errors import CniError
from cni.kernel import netns
from cni.spec import INVALID_NETNS

if TYPE_CHECKING:
    from pathlib import Path

    from lab.wire import Lab


def test_a_namespace_opens_and_is_itself(lab: Lab) -> None:
    fd = netns.open_path(str(lab.node.path))
    again = netns.open_path(str(lab.node.path))
    other = netns.open_path(str(lab.peer.path))
    try:
        assert not os.get_inheritable(fd)
        assert netns.identity(fd) == netns.identity(again) != netns.identity(other)
        assert netns.identity(fd) != netns.own_identity()
    finally:
        for each in (fd, again, other):
            os.close(each)


def test_entering_is_for_the_block_only(lab: Lab) -> None:
    before = netns.own_identity()
    fd = netns.open_path(str(lab.node.path))
    try:
        with netns.entered(fd):
            assert netns.own_identity() == netns.identity(fd)
        assert netns.own_identity() == before
        with pytest.raises(ZeroDivisionError), netns.entered(fd):
            raise ZeroDivisionError
        assert netns.own_identity() == before
    finally:
        os.close(fd)


def _file(folder: Path) -> str:
    (folder / "file").write_text("x")
    return str(folder / "file")


def _fifo(folder: Path) -> str:
    os.mkfifo(folder / "fifo")
    return str(folder / "fifo")


def _link(folder: Path) -> str:
    (folder / "link").symlink_to("/etc/passwd")
    return str(folder / "link")


@pytest.mark.parametrize(
    "make",
    [
        _file,
        _fifo,
        _link,
        str,
        lambda folder: str(folder / "missing"),
        lambda _: "/proc/self/ns/mnt",
        lambda _: "/proc/self/ns/net",
        lambda _: "/dev/tty",
        lambda _: "a\0b",
        lambda _: "",
    ],
    ids=["file", "fifo", "symlink", "folder", "missing", "mount namespace", "own", "device", "NUL", "empty"],
)
def test_anything_else_is_refused_and_nothing_blocks(make: object, tmp_path: Path) -> None:
    assert callable(make)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CniError) as refused:
        netns.open_path(make(tmp_path))
    assert refused.value.code == INVALID_NETNS
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_dead_fd_cannot_be_entered() -> None:
    reader, writer = os.pipe()
    before = netns.own_identity()
    try:
        with pytest.raises(CniError) as refused, netns.entered(reader):
            raise AssertionError("it was entered")
        assert refused.value.code == INVALID_NETNS
        assert netns.own_identity() == before
    finally:
        os.close(reader)
        os.close(writer)
