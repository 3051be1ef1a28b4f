"""Kernel events (uevents) of PCI devices: VFs appear and disappear, and drivers are bound and unbound.

Link events do not cover this: a VF without a driver, or with vfio-pci, has no link.
"""

from __future__ import annotations

import errno
import socket

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
"""The multicast group of the kernel's own uevents; udev sends to another."""
_BUFFER = 1 << 20


class PciEvents:
    """Readable (fileno) when a device of any kind has changed; take() returns whether a PCI device was among them."""

    def __init__(self) -> None:
        self._events = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
        )
        self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._events.bind((0, _KERNEL_GROUP))

    def fileno(self) -> int:
        """For poll()."""
        return self._events.fileno()

    def close(self) -> None:
        """Close the netlink socket."""
        self._events.close()

    def take(self) -> bool:
        """Read the events that have arrived; whether one was of a PCI device, or some were lost. Raises OSError."""
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
            # ACTION@PATH, then KEY=VALUE, each ended by NUL. Port 0 is the kernel; processes may send, too.
            news |= port == 0 and b"SUBSYSTEM=pci" in data.split(b"\0")
