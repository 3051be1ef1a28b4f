"""What one network namespace may use of the fd broker: connections at a time and a second, and lines of the log.

Each namespace has limits of its own, so that one pod uses up nothing of another's. A process may make namespaces
without end, so what is remembered is bounded, and namespaces without an attachment share a quota of the log. Must not
know what is requested.
"""

from __future__ import annotations

import threading

from cni.agent.bucket import Bucket
from cni.dataclass import dataclass, field

Key = tuple[int, int] | None
"""The identity of a namespace (netns.identity); None for all processes whose namespace cannot be looked up."""

PER_POD = 16
"""Connections of one network namespace at a time: more than a pod starts VMs."""
_MOST = 512
"""Connections of all pods at a time."""
BURST, _RATE = 64, 20.0
"""Connections of one namespace: at once, and a second from then on."""
LOG_BURST, _LOG_RATE = 10, 0.5
"""Refusals of one namespace that are logged."""
_STRANGERS_LOG_BURST, _STRANGERS_LOG_RATE = 40, 4.0
"""Refusals that are logged of all namespaces without an attachment: a pod must not be able to fill the disk."""
_REMEMBERED = 2048
"""Namespaces with and without attachments, each; more than _MOST, so that one which is busy is not forgotten."""


@dataclass(eq=False)
class Space:
    """What a network namespace has used."""

    key: Key
    busy: int = 0
    unlogged: int = 0
    attached: bool = False
    """Whether it was seen to have an attachment."""
    connections: Bucket = field(default_factory=lambda: Bucket(BURST, _RATE))
    lines: Bucket = field(default_factory=lambda: Bucket(LOG_BURST, _LOG_RATE))


class Admission:
    """Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._strangers: dict[Key, Space] = {}
        self._attached: dict[Key, Space] = {}
        self._busy = 0
        self._strangers_lines = Bucket(_STRANGERS_LOG_BURST, _STRANGERS_LOG_RATE)

    def enter(self, key: Key) -> tuple[Space, str | None]:
        """The namespace, and why a connection of it is refused; without a reason, the caller calls leave() later."""
        with self._lock:
            known = self._attached if key in self._attached else self._strangers
            space = known.pop(key, None) or Space(key)
            _remember(known, space)
            if not space.connections.take():
                return space, f"this pod connects more than {_RATE:.0f} times a second; try again"
            if space.busy >= PER_POD or self._busy >= _MOST:
                return (
                    space,
                    f"{space.busy} requests of this pod, {self._busy} in all, are being served; try again",
                )
            space.busy += 1
            self._busy += 1
            return space, None

    def leave(self, space: Space) -> None:
        """End a connection that enter() let in."""
        with self._lock:
            space.busy -= 1
            self._busy -= 1

    def has_attachments(self, space: Space) -> None:
        """Note that the namespace has attachments, so that those without cannot displace it."""
        with self._lock:
            if not space.attached:
                space.attached = True
                self._strangers.pop(space.key, None)
                _remember(self._attached, space)

    def may_log(self, space: Space) -> int | None:
        """The number of refusals that were not logged since the last one that was; None if this one must not be."""
        with self._lock:
            if space.lines.take() and (space.attached or self._strangers_lines.take()):
                unlogged, space.unlogged = space.unlogged, 0
                return unlogged
            space.unlogged += 1
            return None


def _remember(known: dict[Key, Space], space: Space) -> None:
    """Add the namespace as the latest; forget the one that is not busy and was used longest ago, if there are many."""
    if len(known) >= _REMEMBERED:
        del known[next(key for key, each in known.items() if not each.busy)]
    known[space.key] = space
