"""What the kernel alone takes for steps that the contender KERNEL has no row for: a link's end, and a port's rules.

The kernel's time is that of the system call which carries out the step, or until the event that an agent waits for.
Must not judge.
"""

from __future__ import annotations

import os
import select
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from cni.agent import link_deletion
from cni.config import port as ports
from cni.kernel import nft, rtnl
from cni.port import filter as filters
from lab.bench.contenders import PORT, new_macvtap
from lab.wire import NIC

if TYPE_CHECKING:
    from lab.wire import Netns

_NAME, _INDEX = "floor1", 0x6FFFFFF0
_MAC = "02:00:00:00:00:01"


@dataclass(frozen=True)
class Floors:
    """Milliseconds, for each round."""

    gone: list[float] = field(default_factory=list)
    """From RTM_DELLINK to its broadcast, when the link is gone. Its ACK follows 15 to 40 ms later."""
    rules: list[float] = field(default_factory=list)
    """The transaction with the rules of a whole port. Without those of its rate."""


class _Timed:
    """A socket of nf_tables that times what is sent."""

    def __init__(self, netlink: nft.Netlink) -> None:
        self._netlink, self.sent, self.has_deleted = netlink, 0, False

    def send(self, data: bytes) -> int:
        begin = time.perf_counter_ns()
        count = self._netlink.send(data)
        self.sent += time.perf_counter_ns() - begin
        return count

    def recv(self, *args: Any) -> bytes:
        return self._netlink.recv(*args)


def measure(node: Netns, pod: Netns, rounds: int) -> Floors:
    """Make a macvtap in the pod, give it the rules, and delete it, in each round. Raises OSError."""
    floors = Floors()
    lower = rtnl.u32(rtnl.IFLA_LINK, node.links()[NIC]["ifindex"])
    fd = os.open(pod.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(rounds):
            nsid = node.call(partial(_make, lower, fd))
            floors.rules.append(pod.call(_rules))
            floors.gone.append(node.call(partial(_gone, nsid)))
    finally:
        os.close(fd)
    return floors


def _make(lower: bytes, pod: int) -> int:
    with rtnl.Rtnl() as own:
        nsid = own.nsid(pod)
        where = lower + rtnl.u32(rtnl.IFLA_NET_NS_FD, pod)
        own.do(new_macvtap(_NAME, where, up=False, index=_INDEX))
    return nsid


def _rules() -> float:
    port = ports.decide(PORT, {}, {}, free=False)
    assert port
    with nft.opened() as netlink:
        timed: Any = _Timed(netlink)
        filters.install(timed, _NAME, port, _MAC, [])
        filters.remove(netlink, _NAME)
    return float(timed.sent / 1e6)


def _gone(nsid: int) -> float:
    begun: list[int] = []

    def delete() -> None:
        with rtnl.Rtnl() as own:
            begun.append(time.perf_counter_ns())
            rtnl.delete_link(own, _INDEX, nsid)

    with link_deletion.watch(_INDEX) as watch:
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        thread = threading.Thread(target=delete)
        thread.start()
        poll.poll()
        end = time.perf_counter_ns()
        thread.join()
    return (end - begun[0]) / 1e6
