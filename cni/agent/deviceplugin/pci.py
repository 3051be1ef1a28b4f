"""The kernel's word that PCI devices have changed: VFs that come and go, and which driver they have.

Not every change of a VF shows by a link: one that has no driver, or vfio's, makes none.
"""

from __future__ import annotations

import errno
import socket

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL = 1
"""The group of the kernel's own words; udev's are in another."""
_BUFFER = 1 << 20


class Changes:
    """Readable (fileno) when a device of any kind has changed; take() says whether one was PCI's."""

    def __init__(self) -> None:
        self._events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
        )
        self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._events.bind((0, _KERNEL))

    def fileno(self) -> int:
        """For poll()."""
        return self._events.fileno()

    def close(self) -> None:
        """End."""
        self._events.close()

    def take(self) -> bool:
        """Take what was said so far; whether it was of PCI devices, or more than could be kept. Raises OSError."""
        news = False
        while True:
            try:
                data, (port, _) = self._events.recvfrom(1 << 16)
            except BlockingIOError:
                return news
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                news = True
                continue
            # ACTION@PATH, then KEY=VALUE, each ended by NUL; anybody in the namespace may send to the group.
            news |= port == 0 and b"SUBSYSTEM=pci" in data.split(b"\0")
