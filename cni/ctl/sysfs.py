"""A detached sysfs of one network namespace: /sys shows the namespace of the process that has mounted it."""

from __future__ import annotations

import os
from contextlib import contextmanager

from cni.kernel import mount, netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Sysfs:
    """The attributes of network devices; None for one that does not exist."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def path(self) -> str:
        """Its path for this process."""
        return f"/proc/self/fd/{self._fd}"

    def text(self, path: str) -> str | None:
        """The attribute as text. path: below class/net."""
        try:
            fd = os.open(f"class/net/{path}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fd)
        except OSError:
            return None
        try:
            return os.read(fd, 4096).decode(errors="replace").strip()
        except OSError:  # EINVAL: the speed of a device that is down
            return None
        finally:
            os.close(fd)

    def number(self, path: str) -> int | None:
        """The attribute as a number."""
        text = self.text(path)
        return int(text) if text and text.removeprefix("-").isdecimal() else None

    def target(self, path: str) -> str | None:
        """The last component of a symbolic link's target."""
        try:
            return os.path.basename(os.readlink(f"class/net/{path}", dir_fd=self._fd))
        except OSError:
            return None


@contextmanager
def of(pod_netns: int | None = None) -> Iterator[Sysfs]:
    """The sysfs of that namespace, or of the calling thread's. Raises CniError."""
    if pod_netns is None:
        fd = mount.detached(b"sysfs")
    else:
        with netns.entered(pod_netns):
            fd = mount.detached(b"sysfs")
    try:
        yield Sysfs(fd)
    finally:
        os.close(fd)
