"""Computes the devices to offer, and their health, from the policy and the node's links.

Must not use netlink (sysfs is read below a folder that the caller gives) and must not import gRPC.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import suppress

from cni.dataclass import dataclass, field, replace
from cni.kernel.rtnl import ARPHRD_ETHER, IFF_LOOPBACK, IFF_LOWER_UP, IFF_RUNNING, IFF_UP
from cni.kernel.sysfs import read_number
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
"""The part of a resource name after the slash (a Kubernetes qualified name)."""
_DISCOVERED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_STACKED_KINDS = ("bond", "team", "vlan")
"""Kinds of links that discovery offers although they are no NIC: they sit on NICs."""


@dataclass(frozen=True)
class Offer:
    """One interface of the policy as a resource. sources: the PFs if the devices are VFs, else the one device."""

    name: str
    sources: tuple[str, ...]
    capacity: int
    """The number of devices; if they are VFs, the largest number."""
    virtual: bool = False
    """Whether each device is a VF."""
    vfs: int | None = None
    """The number of VFs that an ADD creates on a PF that has none."""


@dataclass(frozen=True)
class Device:
    """The state of one device. fault: "" if it is healthy; node: the NUMA node, if known.

    pf, pci: of a VF, its PF and its address; "" where there is none.
    claimed: whether a resource claim has it, or another device in its place: the kubelet must not allocate it.
    """

    fault: str = ""
    next_step: str = ""
    node: int | None = None
    pf: str = ""
    pci: str = ""
    claimed: bool = False


@dataclass(frozen=True)
class Held:
    """What attachments hold now: PCI address → attachment id, and interface index → attachment id.

    claims: the ids of the attachments of prepared resource claims.
    """

    functions: Mapping[str, str] = field(default_factory=dict)
    indexes: Mapping[int, str] = field(default_factory=dict)
    claims: Collection[str] = ()


def offers(interfaces: Iterable[Interface]) -> tuple[list[Offer], dict[str, tuple[str, str]]]:
    """The offers; and for each interface that cannot be offered, by name: (reason, what to do about it)."""
    found: list[Offer] = []
    left: dict[str, tuple[str, str]] = {}
    indexes: dict[int, str] = {}
    for entry in interfaces:
        if not _NAME.fullmatch(entry.name):
            left[entry.name] = (
                "its name is not a valid resource name",
                "let its name end with a letter or a digit",
            )
            continue
        other = indexes.setdefault(deviceid.ifindex(entry.name, 0), entry.name)
        if other != entry.name:
            left[entry.name] = (
                f"its devices would have the same interface indexes as those of {other}",
                "give it another name",
            )
            continue
        vfs = entry.functions.vfs if entry.functions else None
        found.append(Offer(entry.name, entry.sources, entry.devices, entry.functions is not None, vfs))
    return found, left


def devices(offer: Offer, links: Links, sysfs: str, held: Held) -> tuple[Device, ...]:
    """The devices of the offer, by number. sysfs: the mount point of a sysfs of the links' network namespace."""
    if not offer.virtual:
        device, claimed = state(offer.sources[0], links, sysfs), _claimed(offer, held)
        return tuple(replace(device, claimed=number in claimed) for number in range(offer.capacity))
    pfs = {name: _pf(name, offer, links, sysfs) for name in offer.sources}
    found = []
    places = vf_discovery.places(offer.sources, offer.vfs, sysfs)
    for number, (name, function) in enumerate(places[: offer.capacity]):
        device = replace(pfs[name], pci=function.pci) if function else pfs[name]
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


def _claimed(offer: Offer, held: Held) -> set[int]:
    """The numbers of the devices that a kubelet must not allocate, because claims have as many of the interface.

    They are the claims' own. For one beyond the capacity, which was lowered, it is the last one that nobody has: a
    kubelet that starts refuses a pod whose device is unhealthy (devicemanager/manager.go, devicesToAllocate).
    """
    taken = deviceid.numbers(offer.name, held.indexes)
    claimed = deviceid.numbers(offer.name, (index for index, id in held.indexes.items() if id in held.claims))
    free = [number for number in reversed(range(offer.capacity)) if number not in taken]
    return claimed | {*free[: sum(number >= offer.capacity for number in claimed)]}


def _pf(name: str, offer: Offer, links: Links, sysfs: str) -> Device:
    device = replace(state(name, links, sysfs), pf=name)
    many = device.fault and len(offer.sources) > 1
    return replace(device, fault=f"{name}: {device.fault}") if many else device


def _attached(function: Function, device: Device, holder: str, *, mine: bool) -> Device:
    """The state of a VF that an attachment holds. holder: the attachment's id; mine: whether it holds this device."""
    if mine:  # its driver may be unbound at the moment: that is no fault
        return device
    return replace(
        device,
        fault=f"{_label(function)} is held by attachment {holder}, which does not hold this device",
        next_step="delete that attachment, or let every pod of the interface request the resource",
    )


def _free(function: Function, device: Device, links: Links, sysfs: str) -> Device:
    """The state of a VF that no attachment holds: healthy if an ADD could take it (cni/lower/sriov.py).

    Considers only what the device plugin gets events about.
    """
    what = _label(function)
    link = links.get(function.link or "")
    if link is None:
        has = f"has the driver {function.driver}" if function.driver else "has no driver"
        step = f"bind {function.pci} to the driver that makes a link of it"
        return replace(device, fault=f"{what} {has}, and no link on the host", next_step=step)
    if uppers := _uppers(link.name, sysfs):
        step = f"free it: ip link show {uppers[0]}"
        return replace(device, fault=f"{what}, {link.name}, is under {', '.join(uppers)}", next_step=step)
    return device


def _label(function: Function) -> str:
    return f"VF {function.number} of {function.pf}"


def _uppers(link: str, sysfs: str) -> list[str]:
    """The devices on top of the link (sysfs upper_*): its bridge, bond, VLANs."""
    with suppress(OSError):
        names = os.listdir(f"{sysfs}/class/net/{link}")
        return sorted(name.removeprefix("upper_") for name in names if name.startswith("upper_"))
    return []


def state(dev: str, links: Links, sysfs: str) -> Device:
    """The state of every device on the source device dev."""
    link = links.get(dev) or next((each for each in links.values() if dev in each.altnames), None)
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
        return Device(
            "it is not running", f"ip -d link show {dev}; 802.1X, if the switch port requires it", node
        )
    return Device(node=node)


def numa_node(link: Link, links: Links, sysfs: str) -> int | None:
    """The NUMA node of the NIC, or of the NICs below the link if all have the same; else None."""
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
    node = read_number(f"{sysfs}/class/net/{nic}/device/numa_node")
    return node if node is not None and node >= 0 else None


def suitable(links: Links, sysfs: str) -> list[str]:
    """The names of the links that discovery offers, sorted: NICs, bonds and VLANs that are no port of another."""
    return sorted(link.name for link in links.values() if _suitable(link, links, sysfs))


def _suitable(link: Link, links: Links, sysfs: str) -> bool:
    if link.arphrd != ARPHRD_ETHER or link.flags & IFF_LOOPBACK or not _DISCOVERED_NAME.fullmatch(link.name):
        return False
    if link.kind is None:
        # A VF is not shared: it is given to one guest.
        if os.path.lexists(f"{sysfs}/class/net/{link.name}/device/physfn"):
            return False
    elif link.kind not in _STACKED_KINDS:
        return False
    master = next((each for each in links.values() if each.index == link.master), None)
    return link.master is None or (master is not None and master.kind == "vrf")


def preferred(
    available: Iterable[str], must: Iterable[str], size: int, used: Collection[int], pfs: Sequence[str] = ()
) -> list[str]:
    """Ids of `size` devices to allocate: those of must, then those whose interface index is not in used, lowest first.

    Without this preference a kubelet may choose a device whose last pod is not detached yet, and the ADD would wait.
    pfs: the PF of each device number; the PF with the fewest VFs taken goes first. The kubelet has restricted available
    to the NUMA nodes that it accepts.
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
