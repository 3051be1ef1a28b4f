"""Tests whether the switch behind a source has reflective relay (IEEE 802.1Qbg; "hairpin" of a Linux bridge).

Two macvtaps in vepa mode send frames to each other. A macvtap in that mode sends every frame to the wire, so a frame
that arrives has come back from there. They are in a network namespace of this process alone, and end with it. Their
MACs are random, so that two probes do not interfere; the switch learns both, and ages them out.

Does not apply the policy: whoever may run this may send on any NIC.
"""

from __future__ import annotations

import os
import select
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime

from cni.ctl import lldp, self_test, snapshot
from cni.errors import CniError
from cni.kernel import ipv6, macvtap, sysfs, tapdev
from cni.kernel.rtnl import ARPHRD_ETHER, IFF_LOWER_UP, IFF_UP, Rtnl, delete_link, mac_bytes
from cni.spec import NO_ATTACHMENT, SOURCE_MISSING
from cni.state import probe_results
from cni.state.probe_results import Probed
from cni.state.record import boot_id
from cni.state.store import IFINDEX_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from cni.kernel.lldp import Evb, Neighbour
    from cni.kernel.rtnl import Link

_ETHERTYPE = 0x88B5
"""The local experimental ethertype of IEEE 802: no network stack answers it."""
_IFINDEX = IFINDEX_BASE - 2
"""An index that no attachment has, so that a probe's /dev/tapN is never in the place of an attachment's."""
_VNET_HEADER = bytes(10)  # struct virtio_net_hdr, before each frame
_PAYLOAD = 46
_WAITS = (0.2, 0.4, 1.4)
"""Seconds for each try: a NIC needs a moment to accept a new MAC, and a new link up to a second to send."""
_SEEN = {
    2: (True, "frames between two vepa macvtaps came back, both ways"),
    1: (None, "frames between two vepa macvtaps came back one way only: probe again"),
    0: (False, f"no frame between two vepa macvtaps came back, in {len(_WAITS)} tries"),
}


@dataclass(frozen=True)
class Probe:
    """found: by frames. seconds: how long LLDP was listened to; neighbours, evb: what was received, by NIC."""

    found: Probed
    seconds: float
    neighbours: Mapping[str, Neighbour]
    evb: Mapping[str, Evb]

    def document(self) -> dict[str, Any]:
        """For programs."""
        heard = [
            {"nic": nic, **vars(neighbour), "evb": vars(self.evb[nic]) if nic in self.evb else None}
            for nic, neighbour in self.neighbours.items()
        ]
        return {
            "source": self.found.source,
            "reflects": self.found.reflects,
            "why": self.found.why,
            "time": self.found.time,
            "switch": heard,
        }


def run(source: str, folder: str, seconds: float) -> Probe:
    """Probe the source and save the result in the state folder; then listen to LLDP, if seconds is not 0.

    Raises CniError SOURCE_MISSING, 5; OSError: PermissionError without root's capabilities.
    """
    with Rtnl() as host:
        lower = host.link(name=source)
        if lower is None:
            raise CniError(SOURCE_MISSING, f"{source} is not on this node (ip link lists what is there)")
        with ThreadPoolExecutor(1) as thread:  # its thread leaves the namespace, and ends with the block
            reflects, why = thread.submit(_judge, host, lower).result()
        by_index = {each.index: each for each in host.links()}
    with sysfs.mounted() as own:
        changes = own.number(f"{lower.name}/carrier_changes")
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    found = Probed(lower.name, reflects, why, now, changes, boot_id())
    probe_results.save(folder, found)
    nics = snapshot.uplinks(lower, by_index) if seconds else ()
    return Probe(found, seconds, *lldp.listen_for_evb(nics, seconds))


def _judge(host: Rtnl, lower: Link) -> tuple[bool | None, str]:
    """(whether the switch reflects, what was seen). host: a socket of the lower device's network namespace."""
    if why := _unfit(lower):
        return None, why
    try:
        arrived = _exchange(host, lower)
    except PermissionError:
        raise
    except (OSError, CniError) as error:
        return None, _refusal(error, host, lower)
    if arrived < 2:
        now = host.link(index=lower.index)
        why = _unfit(now) if now else "it was deleted"
        if why:
            return None, f"meanwhile, {why}"
    return _SEEN[arrived]


def _unfit(lower: Link) -> str | None:
    if lower.arphrd != ARPHRD_ETHER:
        return "it is not an Ethernet device"
    if not lower.flags & IFF_UP:
        return f"it is down: ip link set {lower.name} up"
    if not lower.flags & IFF_LOWER_UP:
        return "it has no carrier: look at the cable, and at the switch's port"
    return None


def _refusal(error: OSError | CniError, host: Rtnl, lower: Link) -> str:
    """Why the device can have no macvtap. Raises the error again if the cause is not the device."""
    if isinstance(error, CniError):
        if error.code == NO_ATTACHMENT:
            return f"a macvtap on it was deleted: {error}"
        raise error
    master = host.link(index=lower.master) if lower.master else None
    if master:
        return f"it is a port of {master.name}, and a port takes no macvtap: probe {master.name}"
    return f"the kernel refuses macvtaps on it: {error.strerror}"


def _exchange(host: Rtnl, lower: Link) -> int:
    """In how many of the two directions a frame arrived. Raises OSError, CniError."""
    macs = [f"02:{os.urandom(5).hex(':')}" for _ in range(2)]
    tokens = [b"vmtap probe " + os.urandom(8).hex().encode() for _ in range(2)]
    poll = select.poll()
    taps: dict[int, int] = {}
    with ExitStack() as stack:
        pod = self_test.leave(stack)
        there = stack.enter_context(Rtnl())
        for number, mac in enumerate(macs):
            fd = _make(stack, host, lower, pod, there=there, ifindex=_IFINDEX + number, mac=mac)
            taps[fd] = number
            poll.register(fd, select.POLLIN)
        arrived: set[int] = set()
        for seconds in _WAITS:
            for fd, number in taps.items():
                head = mac_bytes(macs[1 - number]) + mac_bytes(macs[number]) + _ETHERTYPE.to_bytes(2)
                os.write(fd, _VNET_HEADER + head + tokens[number].ljust(_PAYLOAD, b"\0"))
            until = time.monotonic() + seconds
            while len(arrived) < 2 and (left := until - time.monotonic()) > 0:
                for fd, _ in poll.poll(left * 1000):
                    with suppress(BlockingIOError):
                        if tokens[1 - taps[fd]] in os.read(fd, 1 << 17):  # otherwise it is another broadcast
                            arrived.add(taps[fd])
            if len(arrived) == 2:
                break
    return len(arrived)


def _make(stack: ExitStack, host: Rtnl, lower: Link, pod: int, *, there: Rtnl, ifindex: int, mac: str) -> int:
    """Make a macvtap in pod, the calling thread's network namespace, up. Returns its fd. The stack removes both."""
    ifname = f"probe{ifindex - _IFINDEX}"
    macvtap.create(
        host,
        netns=pod,
        lower=lower,
        ifname=ifname,
        ifindex=ifindex,
        mode="vepa",
        mac=mac,
        mtu=lower.mtu,
        bcqueuelen=None,
    )
    # Not left to the namespace's end, which comes some time after its last process'.
    stack.callback(delete_link, there, ifindex, None)
    ipv6.keep_out(ifname, speaks=False)
    macvtap.bring_up(there, ifindex, "vmtapctl probe", promisc=False, allmulti=False, speaks=False)
    _, major, minor = tapdev.number(pod, ifname)
    fd = tapdev.open_node((major, minor))
    stack.callback(os.close, fd)
    return fd
