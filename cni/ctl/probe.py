"""Does the switch behind a source reflect (reflective relay of IEEE 802.1Qbg, a Linux bridge's "hairpin")? Tried.

Two macvtaps in vepa mode send frames to each other. Such a macvtap hands everything to the wire, so what arrives
came back from there. They are in a network namespace that only this process is in, silent as ADD makes them:
whatever is killed when, they end with it. Their MACs are random, so that two probes at once, or of two nodes, do not
meet; the switch learns both, and forgets them as it does others.

Must not ask the policy: who may run this may send on any NIC.
"""

from __future__ import annotations

import os
import select
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime

from cni.ctl import lldp, self_test, snapshot, sysfs
from cni.errors import CniError
from cni.kernel import ipv6, macvtap, tapdev
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

    from cni.ctl.lldp import Evb, Neighbour
    from cni.kernel.rtnl import Link

_ETHERTYPE = 0x88B5
"""IEEE 802's for local experiments: no stack answers it."""
_IFINDEX = IFINDEX_BASE - 2
"""No attachment's, so that nobody finds a /dev/tapN of ours in the place of one."""
_VNET_HEADER = bytes(10)  # struct virtio_net_hdr, before each frame
_PAYLOAD = 46
_WAITS = (0.2, 0.4, 1.4)
"""Seconds for each try: a NIC may take a moment to let new MACs in, a link that came up a second to send."""
_SEEN = {
    2: (True, "frames between two vepa macvtaps came back, both ways"),
    1: (None, "frames between two vepa macvtaps came back one way only: probe again"),
    0: (False, f"of frames between two vepa macvtaps none came back, in {len(_WAITS)} tries"),
}


@dataclass(frozen=True)
class Probe:
    """found: by frames. seconds: how long LLDP was listened to; neighbours and evb, by NIC, are what it said."""

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
    """Probe it, and remember that in the state folder; then listen to LLDP, if seconds is not 0.

    Raises CniError SOURCE_MISSING, 5; OSError: PermissionError without root's capabilities.
    """
    with Rtnl() as host:
        lower = host.link(name=source)
        if lower is None:
            raise CniError(SOURCE_MISSING, f"{source} is not on this node (ip link lists what is there)")
        with ThreadPoolExecutor(1) as thread:  # its thread leaves the namespace, and ends with the block
            reflects, why = thread.submit(_judge, host, lower).result()
        by_index = {each.index: each for each in host.links()}
    with sysfs.of() as own:
        changes = own.number(f"{lower.name}/carrier_changes")
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    found = Probed(lower.name, reflects, why, now, changes, boot_id())
    probe_results.save(folder, found)
    nics = snapshot.uplinks(lower, by_index) if seconds else ()
    return Probe(found, seconds, *lldp.listen_for_evb(nics, seconds))


def _judge(host: Rtnl, lower: Link) -> tuple[bool | None, str]:
    """(Does it reflect, what was seen.) host: a socket of the namespace of lower, where the calling thread was."""
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
        why = _unfit(now) if now else "it went away"
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
    """Why there can be no macvtaps on it. Raises the error again, if it is not the device's fault."""
    if isinstance(error, CniError):
        if error.code == NO_ATTACHMENT:
            return f"a macvtap on it went away: {error}"
        raise error
    master = host.link(index=lower.master) if lower.master else None
    if master:
        return f"it is a port of {master.name}, and a port takes no macvtap: probe {master.name}"
    return f"the kernel refuses macvtaps on it: {error.strerror}"


def _exchange(host: Rtnl, lower: Link) -> int:
    """Over how many of the two ways, there and back, a frame arrived. Raises OSError, CniError."""
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
                        if tokens[1 - taps[fd]] in os.read(fd, 1 << 17):  # else a broadcast of somebody's
                            arrived.add(taps[fd])
            if len(arrived) == 2:
                break
    return len(arrived)


def _make(stack: ExitStack, host: Rtnl, lower: Link, pod: int, *, there: Rtnl, ifindex: int, mac: str) -> int:
    """A macvtap in the calling thread's namespace pod, up; its fd. Both end with the stack."""
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
