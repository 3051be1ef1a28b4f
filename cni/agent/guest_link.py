"""A macvtap whose guest is watched: its state, and sockets in its network namespace while it waits for the guest.

Must not decide when the state changes: handover.py does.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from cni.agent.log import log
from cni.dataclass import dataclass
from cni.errors import CniError
from cni.kernel import last_frame, macvtap, netns, packet
from cni.kernel.rtnl import Rtnl
from cni.state.lookup import opened_netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from cni.state.record import Record

NEVER = float("inf")


@dataclass
class GuestLink:
    """The link and its state."""

    record: Record
    mac: bytes
    lower: int
    """The interface index of the lower device."""
    state: str = "waiting"
    until: float = NEVER
    """When the state ends without a frame; monotonic seconds."""
    begun: float = 0.0
    """When the link was made, or its MAC was announced; monotonic seconds."""
    on_wire: float | None = None
    """When a frame of the MAC was last received from the wire in this wait; monotonic seconds."""
    silent: float | None = None
    """From the guest's last frame before this wait to the beginning of the wait, seconds; None: not known."""
    ear: socket.socket | None = None
    """Hears the guest; open while the link waits."""
    _pod: Rtnl | None = None
    """A socket of the link's network namespace, which changes the mode; open as long as ear."""

    @property
    def mode(self) -> str:
        """The mode that the link has in this state."""
        return "vepa" if self.state == "waiting" else "bridge"

    def open(self, pod: int) -> socket.socket:
        """Open the sockets, and return the ear. pod: an fd of the network namespace. Raises OSError or CniError."""
        with netns.entered(pod):
            ear = packet.guest(self.record.ifname)
            try:
                self._pod = Rtnl()
            except BaseException:
                ear.close()
                raise
            self.silent = None
            with suppress(OSError):  # a kernel without it: only this figure is missing
                self.silent = last_frame.watch(self.record.ifname)
        self.ear = ear
        return ear

    def close(self, close: Callable[[socket.socket], object]) -> None:
        """Close the sockets, the ear by `close`; a second call does nothing."""
        if self.ear:
            close(self.ear)
            self.ear = None
        if self._pod:
            self._pod.close()
            self._pod = None

    def set_mode(self, mode: str) -> bool:
        """Put the link into vepa or bridge mode, while the sockets are open. False: it is gone. Raises OSError."""
        if self._pod is None:  # its network namespace is gone, or dies with its last socket
            return False
        try:
            macvtap.set_mode(self._pod, self.record.ifindex, mode)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return False
        return True

    def forget_frames(self) -> None:
        """Remove what open() has left in the network namespace, if the record's path still leads to it."""
        with suppress(CniError, OSError), opened_netns(self.record, search=False) as pod:
            if pod is not None:
                with netns.entered(pod):
                    last_frame.forget(self.record.ifname)

    def log(self, level: int, msg: str, **fields: object) -> None:
        """Write a log line about the link."""
        record = self.record
        log(
            level,
            msg,
            network=record.network,
            container=record.container_id,
            ifname=record.ifname,
            mac=record.mac,
            **fields,
        )
