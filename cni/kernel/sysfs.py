"""Reads attributes of devices from sysfs. A sysfs shows the links of the network namespace that it was mounted in."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress

from cni.kernel import mount, netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def attribute(path: str, folder: int | None = None) -> str:
    """The attribute, without its newline. folder: an fd that path is relative to. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, 4096).decode(errors="replace").strip()
    finally:
        os.close(fd)


def read(path: str, folder: int | None = None) -> str:
    """As attribute(), but "" if there is no such file, or it cannot be read now (the speed of a link that is down)."""
    with suppress(OSError):
        return attribute(path, folder)
    return ""


def read_number(path: str, folder: int | None = None) -> int | None:
    """The attribute as a decimal number; None if it is none, or cannot be read."""
    text = read(path, folder)
    return int(text) if text.removeprefix("-").isdecimal() else None


@contextmanager
def mounted(pod_netns: int | None = None) -> Iterator[Sysfs]:
    """Mount the sysfs of a network namespace, of the calling thread's without pod_netns. Raises CniError 5, 8."""
    if pod_netns is None:
        fd = mount.detached(b"sysfs")
    else:
        with netns.entered(pod_netns):
            fd = mount.detached(b"sysfs")
    try:
        yield Sysfs(fd)
    finally:
        os.close(fd)


class Sysfs:
    """The links of one network namespace. A path is relative to class/net: "eth1/mtu"."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def path(self) -> str:
        """The mount point, for this process."""
        return f"/proc/self/fd/{self._fd}"

    def attribute(self, path: str) -> str:
        """The attribute, without its newline. Raises OSError."""
        return attribute(f"class/net/{path}", self._fd)

    def number(self, path: str) -> int | None:
        """The attribute as a decimal number; None if it is none, or cannot be read."""
        return read_number(f"class/net/{path}", self._fd)

    def target(self, path: str) -> str | None:
        """The last component of the symbolic link's target; None if there is no such link."""
        with suppress(OSError):
            return os.path.basename(os.readlink(f"class/net/{path}", dir_fd=self._fd))
        return None
