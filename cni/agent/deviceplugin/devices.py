"""What is offered of the node's interfaces, and in what health: plain logic, from policy and links to devices.

Must not ask the kernel (sysfs is read through a folder that is given) and must not know gRPC.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from cni import deviceid
from cni.rtnl import ARPHRD_ETHER, IFF_LOOPBACK, IFF_LOWER_UP, IFF_RUNNING, IFF_UP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from cni.policy import Interface
    from cni.rtnl import Link

    Links = Mapping[str, Link]

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
"""What may stand behind the slash of a resource's name (a Kubernetes qualified name)."""
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OVER = ("bond", "team", "vlan")
"""Kinds of links that are as good as the NICs below them."""


@dataclass(frozen=True)
class Offer:
    """One interface as a resource. number of a device: 0 to capacity - 1."""

    name: str
    dev: str
    capacity: int


@dataclass(frozen=True)
class State:
    """What a source's devices are like. fault: "" if they are healthy; node: of NUMA, None if none is known."""

    fault: str = ""
    next_step: str = ""
    node: int | None = None


def offers(interfaces: Iterable[Interface]) -> tuple[list[Offer], dict[str, tuple[str, str]]]:
    """What to offer; and by name, why an interface is not, and what to do about it."""
    found: list[Offer] = []
    left: dict[str, tuple[str, str]] = {}
    indexes: dict[int, str] = {}
    for entry in interfaces:
        if entry.type != "ethernet":
            left[entry.name] = (f"its type {entry.type} is not offered so far", "make it of type ethernet")
            continue
        if not _NAME.fullmatch(entry.name):
            left[entry.name] = ("no resource can be named so", "let its name end with a letter or a digit")
            continue
        other = indexes.setdefault(deviceid.ifindex(entry.name, 0), entry.name)
        if other != entry.name:
            left[entry.name] = (
                f"its devices would have the interface indexes of {other}'s",
                "give it another name",
            )
            continue
        found.append(Offer(entry.name, entry.dev, entry.devices))
    return found, left


def state(dev: str, links: Links, sysfs: str) -> State:
    """Of the source dev. sysfs: where one is mounted that shows these links."""
    link = links.get(dev)
    if link is None:
        return State("it is not on this node", "plug it in, or correct the policy")
    node = numa_node(link, links, sysfs)
    if not link.flags & IFF_UP:
        return State("it is down", f"ip link set {dev} up", node)
    if not link.flags & IFF_LOWER_UP:
        port = (
            "give it a port that has one"
            if link.kind == "bridge"
            else "look at the cable, and at the switch's port"
        )
        return State("it has no carrier", port, node)
    if not link.flags & IFF_RUNNING:  # dormant, or in a test
        return State("it is not running", f"ip -d link show {dev}; 802.1X, if its port asks for it", node)
    return State(node=node)


def numa_node(link: Link, links: Links, sysfs: str) -> int | None:
    """Where the NIC is, or the NICs below it if they all are there."""
    nodes = {node for nic in _nics(link, links, set()) if (node := _numa_node(nic, sysfs)) is not None}
    return nodes.pop() if len(nodes) == 1 else None


def _nics(link: Link, links: Links, seen: set[int]) -> Iterator[str]:
    if link.index in seen:
        return
    seen.add(link.index)
    below = [each for each in links.values() if each.master == link.index]
    if link.lower is not None and link.lower_nsid is None:
        below += [each for each in links.values() if each.index == link.lower]
    if not below:
        yield link.name
    for each in below:
        yield from _nics(each, links, seen)


def _numa_node(nic: str, sysfs: str) -> int | None:
    try:
        with open(f"{sysfs}/class/net/{nic}/device/numa_node", encoding="ascii") as file:
            node = int(file.read())
    except (OSError, ValueError):  # EINVAL of a device that is going, say
        return None
    return node if node >= 0 else None


def suitable(links: Links, sysfs: str) -> list[str]:
    """The links that discovery offers: NICs, bonds and VLANs that are not in use as a port, by name."""
    return sorted(link.name for link in links.values() if _suitable(link, links, sysfs))


def _suitable(link: Link, links: Links, sysfs: str) -> bool:
    if link.arphrd != ARPHRD_ETHER or link.flags & IFF_LOOPBACK or not _INTERFACE.fullmatch(link.name):
        return False
    if link.kind is None:
        # A virtual function is for a guest of its own.
        if os.path.lexists(f"{sysfs}/class/net/{link.name}/device/physfn"):
            return False
    elif link.kind not in _OVER:
        return False
    master = next((each for each in links.values() if each.index == link.master), None)
    return link.master is None or (master is not None and master.kind == "vrf")


def preferred(available: Iterable[str], must: Iterable[str], size: int, used: Collection[int]) -> list[str]:
    """Which devices to take, as ids: what must be, then those whose interface index nobody uses, the lowest first.

    A kubelet's own choice may fall on a device whose last pod is not detached yet: an ADD for it would have to wait.
    """

    def order(id: str) -> tuple[bool, int]:
        index = deviceid.index_of(id)
        return index in used or not index, index

    chosen = list(dict.fromkeys(must))
    rest = sorted(set(available) - set(chosen), key=order)
    return (chosen + rest)[: max(size, len(chosen))]
