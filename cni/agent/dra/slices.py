"""The devices of the node's ResourceSlices, from the policy and the links. Must not use the network or gRPC.

Each interface has as many devices as its capacity, all alike; of an SR-IOV entry each device is a virtual function. A
device without its source is left out, and one for each device or VF that an attachment without a claim holds: a
scheduler must not choose it. A link without a carrier is no reason: the attribute shows it, and a class may select by
it. Every attribute but those of PCI is always there, since a selector that reads a missing one fails.

Where the API server knows devices that have several allocations at once, one stands for all of an interface that are
alike, with a capacity of as many slots.
"""

from __future__ import annotations

import os
from functools import cache

from cni.agent.deviceplugin.devices import Held, devices, numa_node, offers, state
from cni.config.claim import DRIVER, device_name
from cni.config.policy import IMPOSSIBLE, MODES
from cni.dataclass import dataclass, field
from cni.kernel.rtnl import IFF_LOWER_UP, IFF_RUNNING, IFF_UP
from cni.kernel.sysfs import read_number
from cni.state import deviceid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from typing import Any

    from cni.agent.deviceplugin.devices import Device, Offer
    from cni.config.policy import Interface
    from cni.kernel.lldp import Neighbour
    from cni.kernel.rtnl import Link

DEVICES = 128
"""Devices of a ResourceSlice at most (resource.k8s.io/v1, ResourceSliceMaxDevices)."""
MOST = 4096
"""Devices of a node at most: more are left out. Each is 1 KiB for the API server and for every scheduler."""
PCI = "resource.kubernetes.io/pciBusID"
SEVERAL = "allowMultipleAllocations"
"""A field of a device. API servers without the feature gate DRAConsumableCapacity drop it."""
_ROOT = "resource.kubernetes.io/pcieRoot"
_TEXT = 64
"""Characters of a string attribute at most (DeviceAttributeMaxValueLength)."""
_UP = IFF_UP | IFF_LOWER_UP | IFF_RUNNING


@dataclass(frozen=True)
class Pool:
    """The devices as in ResourceSlices, and why interfaces have none, by name: (reason, what to do about it)."""

    devices: list[dict[str, Any]]
    left_out: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """The node as it is now. sysfs: one that shows the links."""

    links: Mapping[str, Link]
    sysfs: str
    held: Mapping[str, str] = field(default_factory=dict)
    """PCI address of a VF → the id of the attachment that holds it."""
    claimed: Collection[str] = ()
    """The names of devices of prepared claims, which stay; that of a shared device as often as claims have it."""
    attached: Collection[str] = ()
    """The ids of the attachments of prepared claims."""
    indexes: Collection[int] = ()
    """The interface indexes that are reserved."""
    neighbours: Mapping[str, Neighbour] = field(default_factory=dict)
    """The switch ports that LLDP has stated, by NIC."""

    @property
    def foreign(self) -> Held:
        """What others hold. An ADD of a claim takes any free VF of the PF, not that of its device's number."""
        return Held({pci: id for pci, id in self.held.items() if id not in self.attached})

    def link(self, name: str) -> Link | None:
        """The link of that name or altname."""
        return self.links.get(name) or next(
            (each for each in self.links.values() if name in each.altnames), None
        )

    def numbers(self, entry: Interface, offer: Offer, now: tuple[Device, ...]) -> Iterator[int]:
        """The numbers of the devices to offer.

        One that cannot be used, and that no claim has, is left out. Where an attachment without a claim has any of the
        interface, or has taken a claim's VF, it is the last one that no claim has.
        """
        for pf in dict.fromkeys(each.pf for each in now):
            numbers = [number for number, each in enumerate(now) if each.pf == pf]
            taken = [number for number in numbers if device_name(entry.name, number) in self.claimed]
            free = [number for number in numbers if number not in taken]
            useless = 0
            if not offer.virtual:
                useless = len(deviceid.numbers(entry.name, self.indexes)) - len(taken)
            elif not state(pf, self.links, self.sysfs).fault:  # such as no carrier: all its VFs have it
                free = [number for number in free if not now[number].fault]
                useless = sum(bool(now[number].fault) for number in taken)
            yield from sorted([*taken, *free[: max(0, len(free) - useless)]])

    def slots(self, entry: Interface) -> int:
        """How many claims may have the interface's shared device, those that have it now included."""
        shared = device_name(entry.name, None)
        others = len(deviceid.numbers(entry.name, self.indexes)) - sum(
            each == shared for each in self.claimed
        )
        return entry.devices - others

    def attributes(self, link: Link, device: Device) -> dict[str, Any]:
        """The attributes that follow from the source's link."""
        folder = f"{self.sysfs}/class/net/{link.name}"
        neighbour = self.neighbours.get(link.name)
        numa = device.node if device.node is not None else numa_node(link, self.links, self.sysfs)
        found: dict[str, Any] = {
            "mtu": {"int": link.mtu},
            "carrier": {"bool": link.flags & _UP == _UP},
            "speed": {"int": max(0, read_number(f"{folder}/speed") or 0)},
            "numaNode": {"int": -1 if numa is None else numa},
            "switch": {"string": _short(neighbour.system if neighbour else "")},
            "switchPort": {"string": _short(neighbour.port if neighbour else "")},
        }
        if pci := device.pci or _pci(f"{folder}/device"):
            found[PCI] = {"string": pci}
        if root := _pci_root(folder):  # which a PF and its VFs share
            found[_ROOT] = {"string": root}
        return found


def pool(interfaces: Iterable[Interface], node: Node, *, shares: bool = False) -> Pool:
    """The node's devices, in the order of the policy. shares: whether a device may have several allocations."""
    entries = {entry.name: entry for entry in interfaces}
    found: list[dict[str, Any]] = []
    offered, left_out = offers(entries.values())
    for offer in offered:
        entry = entries[offer.name]
        now = devices(offer, node.links, node.sysfs, node.foreign)
        of_link = cache(node.attributes)  # the devices of a NIC are alike, and each look reads sysfs
        slots = node.slots(entry) if shares and not offer.virtual else None
        numbers = node.numbers(entry, offer, now) if slots is None else [None] * (slots > 0)
        for number in numbers:
            device = now[number or 0]
            source = device.pf or offer.sources[0]
            link = node.link(source)
            if link is None:
                left_out[offer.name] = (f"{source} is not on this node", "plug it in, or correct the policy")
                continue
            attributes = {**_of_policy(entry, number, source), **of_link(link, device)}
            if entry.functions and not device.pci:  # it is not there yet, and the address is the PF's
                attributes.pop(PCI, None)
            one = {"name": device_name(entry.name, number), "attributes": attributes}
            found.append(one if slots is None else one | _shared(slots))
    if len(found) > MOST:
        what = f"the policy has {len(found)} devices, and a node's slices {MOST}"
        left_out["*"] = (what, "lower the capacities")
    return Pool(found[:MOST], left_out)


def chunks(devices: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The devices of each slice. A pool without devices has one slice, which shows that the driver is there."""
    return [devices[at : at + DEVICES] for at in range(0, len(devices), DEVICES)] or [[]]


def count(devices: Iterable[dict[str, Any]]) -> int:
    """How many claims could have one of these devices at once."""
    return sum(int(each["capacity"]["slots"]["value"]) if SEVERAL in each else 1 for each in devices)


def _shared(slots: int) -> dict[str, Any]:
    """The fields of a device of which a request gets one slot each."""
    policy = {"default": "1", "validValues": ["1"]}
    return {SEVERAL: True, "capacity": {"slots": {"value": str(slots), "requestPolicy": policy}}}


def _of_policy(entry: Interface, number: int | None, source: str) -> dict[str, Any]:
    """The attributes that follow from the policy's entry."""
    modes = entry.modes or MODES
    name = device_name(entry.name, number)
    return {
        "interface": {"string": entry.name},
        "source": {"string": source},
        "type": {"string": entry.type},
        **{mode: {"bool": mode in modes and (entry.type, mode) not in IMPOSSIBLE} for mode in MODES},
        "vlans": {"string": _vlans(entry)},
        "k8s.cni.cncf.io/deviceID": {"string": name},
        "k8s.cni.cncf.io/resourceName": {"string": f"{DRIVER}/{entry.name}"},
    }


def _vlans(entry: Interface) -> str:
    """The VLANs as ",100,200,", which a selector searches for ",100,"; "any"; "many" if they are too long."""
    if entry.vlans is None:
        return "any"
    text = f",{','.join(map(str, entry.vlans))},"
    return text if len(text) <= _TEXT else "many"


def _short(text: str) -> str:
    """As much of the text as an attribute may have."""
    return text.encode()[:_TEXT].decode(errors="ignore")


def _pci(device: str) -> str:
    """The PCI address of a NIC; "" if it is no PCI device. device: its folder in sysfs."""
    try:
        subsystem = os.path.basename(os.readlink(f"{device}/subsystem"))
        return os.path.basename(os.readlink(device)) if subsystem == "pci" else ""
    except OSError:
        return ""


def _pci_root(link: str) -> str:
    """The PCI host bridge of a NIC, as "pci0000:00"; "" without one. link: its entry of class/net in sysfs."""
    try:
        root = os.readlink(link).partition("/devices/")[2].partition("/")[0]
    except OSError:
        return ""
    return root if root.startswith("pci") else ""
