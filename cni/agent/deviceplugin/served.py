"""One resource that is offered to the kubelet: its socket, the state of its registration, and when to try again."""

from __future__ import annotations

import time

from cni.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.agent.deviceplugin.devices import Device, Offer
    from cni.agent.deviceplugin.registration import Registration
    from cni.agent.deviceplugin.serving import Resource

SOONEST = 1.0
LATEST = 30.0
"""Seconds between attempts. A kubelet ends a client in several steps, by the resource's name: a client that registers
between two of them would be marked as stopped, and keep its stream."""
STREAM_SECONDS = 15.0
"""How long a kubelet that has accepted a registration may take to open the stream."""


@dataclass
class Served:
    """One resource and the state of its registration."""

    offer: Offer
    devices: tuple[Device, ...] = ()
    resource: Resource | None = None
    """None if the kubelet's folder is missing, or the socket cannot be served now."""
    accepted: bool = False
    """Whether the kubelet has accepted a registration of the resource's socket."""
    pending: Registration | None = None
    """The registration that the kubelet has not answered yet."""
    due: float = 0.0
    """When to try next, or to give up waiting for the stream, by time.monotonic()."""
    failures: int = 0
    error: str = ""

    @property
    def watched(self) -> bool:
        """Whether the kubelet has a stream of the resource open."""
        resource = self.resource
        return resource is not None and resource.watched

    def accept(self) -> None:
        """Note that the kubelet has accepted the registration. The failures count until forgive()."""
        self.accepted, self.error = True, ""
        self.due = time.monotonic() + STREAM_SECONDS

    def forgive(self) -> None:
        """Forget the failures before a registration whose stream lasted: streams that end soon make the pause grow."""
        if self.accepted and time.monotonic() - self.due > LATEST:
            self.failures = 0

    def later(self) -> float:
        """Schedule the next attempt after a failure; the seconds until then."""
        self.failures += 1
        pause = min(LATEST, SOONEST * 2.0 ** (self.failures - 1))
        self.due = time.monotonic() + pause
        return pause

    def renew(self) -> None:
        """Serve and register on a new socket: now, or after a pause if this ends a stream of the kubelet's."""
        self.due = time.monotonic() + SOONEST if self.watched else 0.0
        self.failures, self.error = 0, ""
        self.close()

    def close(self, *, withdraw: bool = False) -> None:
        """Stop to serve; the next attempt makes another socket. withdraw: as of Resource.close()."""
        if self.pending:
            self.pending.close()
        if self.resource:
            self.resource.close(withdraw=withdraw)
        self.pending, self.resource, self.accepted = None, None, False
