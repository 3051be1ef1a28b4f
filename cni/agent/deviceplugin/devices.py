"""What is offered of the node's interfaces, and in what health: plain logic, from policy and links to devices.

Must not ask the kernel (sysfs is read through a folder that is given) and must not know gRPC.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace

from cni.kernel.rtnl import ARPHRD_ETHER, IFF_LOOPBACK, IFF_LOWER_UP, IFF_RUNNING, IFF_UP
from cni.lower import vf_discovery
from cni.state import deviceid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from cni.config.policy import Interface
    from cni.kernel.rtnl import Link
    from cni.lower.vf_discovery import Function

    Links = Mapping[str, Link]

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
"""What may stand behind the slash of a resource's name (a Kubernetes qualified name)."""
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OVER = ("bond", "team", "vlan")
"""Kinds of links that are as good as the NICs below them."""


@dataclass(frozen=True)
class Offer:
    """One interface as a resource. sources: of VFs the pool of PFs, else the one device."""

    name: str
    sources: tuple[str, ...]
    capacity: int
    """How many devices; of VFs at most."""
    virtual: bool = False
    """Whether each device is a virtual function."""
    vfs: int | None = None
    """How many VFs an ADD makes of a PF that has none."""


@dataclass(frozen=True)
class Device:
    """What one device is like. fault: "" if it is healthy; node: of NUMA, None if none is known; pf: of a VF."""

    fault: str = ""
    next_step: str = ""
    node: int | None = None
    pf: str = ""


@dataclass(frozen=True)
class Held:
    """What attachments have now, each with the attachment's id: VFs by PCI address, devices by interface index."""

    functions: Mapping[str, str] = field(default_factory=dict)
    indexes: Mapping[int, str] = field(default_factory=dict)


def offers(interfaces: Iterable[Interface]) -> tuple[list[Offer], dict[str, tuple[str, str]]]:
    """What to offer; and by name, why an interface is not, and what to do about it."""
    found: list[Offer] = []
    left: dict[str, tuple[str, str]] = {}
    indexes: dict[int, str] = {}
    for entry in interfaces:
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
        vfs = entry.functions.vfs if entry.functions else None
        found.append(Offer(entry.name, entry.sources, entry.devices, entry.functions is not None, vfs))
    return found, left


def devices(offer: Offer, links: Links, sysfs: str, held: Held) -> tuple[Device, ...]:
    """What there is of the offer, by number. sysfs: where one is mounted that shows these links."""
    if not offer.virtual:
        return (state(offer.sources[0], links, sysfs),) * offer.capacity
    pfs = {name: _pf(name, offer, links, sysfs) for name in offer.sources}
    found = []
    places = vf_discovery.places(offer.sources, offer.vfs, sysfs)
    for number, (name, function) in enumerate(places[: offer.capacity]):
        device = pfs[name]
        if function and function.numa >= 0:
            device = replace(device, node=function.numa)
        if function and not device.fault:
            holder, wanted = held.functions.get(function.pci), deviceid.ifindex(offer.name, number)
            if holder:
                device = _attached(function, device, holder, mine=holder == held.indexes.get(wanted))
            else:
                device = _free(function, device, links, sysfs)
        elif (
            not function and not device.fault and (most := vf_discovery.most(name, sysfs)) < (offer.vfs or 0)
        ):
            device = replace(
                device,
                fault=f"{name} can have {most} VFs, and vfs says {offer.vfs}",
                next_step="correct vfs in the policy, or switch SR-IOV on in the NIC's firmware",
            )
        found.append(device)
    return tuple(found)


def _pf(name: str, offer: Offer, links: Links, sysfs: str) -> Device:
    device = replace(state(name, links, sysfs), pf=name)
    many = device.fault and len(offer.sources) > 1
    return replace(device, fault=f"{name}: {device.fault}") if many else device


def _attached(function: Function, device: Device, holder: str, *, mine: bool) -> Device:
    """Of a VF that the attachment of that id has; mine: by this device. Its driver may be being bound anew."""
    if mine:
        return device
    return replace(
        device,
        fault=f"{_words(function)} is attached by {holder}, which has not this device",
        next_step="end that one, or have each of the interface's pods ask for the resource",
    )


def _free(function: Function, device: Device, links: Links, sysfs: str) -> Device:
    """Of a VF that no attachment has: whether an ADD could take it, as far as events tell (cni/lower/sriov.py)."""
    what = _words(function)
    link = links.get(function.link or "")
    if link is None:
        has = f"has the driver {function.driver}" if function.driver else "has no driver"
        step = f"bind {function.pci} to the driver that makes a link of it"
        return replace(device, fault=f"{what} {has}, and no link here", next_step=step)
    if uppers := _uppers(link.name, sysfs):
        step = f"take it from the host: ip link show {uppers[0]}"
        return replace(device, fault=f"{what}, {link.name}, is under {', '.join(uppers)}", next_step=step)
    return device


def _words(function: Function) -> str:
    return f"VF {function.number} of {function.pf}"


def _uppers(link: str, sysfs: str) -> list[str]:
    """The bridge, the bond, the VLANs that have the link."""
    with suppress(OSError):
        names = os.listdir(f"{sysfs}/class/net/{link}")
        return sorted(name.removeprefix("upper_") for name in names if name.startswith("upper_"))
    return []


def state(dev: str, links: Links, sysfs: str) -> Device:
    """What every device on the source dev is like."""
    link = links.get(dev)
    if link is None:
        return Device("it is not on this node", "plug it in, or correct the policy")
    node = numa_node(link, links, sysfs)
    if not link.flags & IFF_UP:
        return Device("it is down", f"ip link set {dev} up", node)
    if not link.flags & IFF_LOWER_UP:
        port = (
            "give it a port that has one"
            if link.kind == "bridge"
            else "look at the cable, and at the switch's port"
        )
        return Device("it has no carrier", port, node)
    if not link.flags & IFF_RUNNING:  # dormant, or in a test
        return Device("it is not running", f"ip -d link show {dev}; 802.1X, if its port asks for it", node)
    return Device(node=node)


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


def preferred(
    available: Iterable[str], must: Iterable[str], size: int, used: Collection[int], pfs: Sequence[str] = ()
) -> list[str]:
    """Which devices to take, as ids: what must be, then those whose interface index nobody uses, the lowest first.

    A kubelet's own choice may fall on a device whose last pod is not detached yet: an ADD for it would have to wait.
    pfs: the PF of each number; the one with the fewest VFs taken goes first. Which NUMA nodes may be is the kubelet's
    to say, by what it makes available.
    """

    def index(id: str) -> tuple[bool, int]:
        found = deviceid.index_of(id)
        return found in used or not found, found

    def pf(id: str) -> str:
        parsed = deviceid.parse(id)
        return pfs[parsed[1]] if parsed and parsed[1] < len(pfs) else ""

    chosen = list(dict.fromkeys(must))
    rest = sorted(set(available) - set(chosen), key=index, reverse=True)
    free = {name: [id for id in rest if pf(id) == name] for name in {*map(pf, rest)}}
    load = Counter(pfs)
    load.subtract(pf(id) for id in rest if not index(id)[0])
    while free and len(chosen) < size:
        name = min(free, key=lambda name: (index(free[name][-1])[0], load[name], index(free[name][-1])))
        chosen.append(free[name].pop())
        load[name] += 1
        if not free[name]:
            del free[name]
    return chosen
