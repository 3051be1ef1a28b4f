"""What a trace knows of both ends, and what it concludes. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from cni.kernel.bridge_vlans import Vlans
    from cni.state.port_profile import Port

CAN, CANNOT, MAY = "can", "cannot", "may"


@dataclass(frozen=True)
class Medium:
    """What the frames of an attachment pass first: a macvtap's lower device, a tap's bridge, or the PF of a VF."""

    name: str
    index: int
    """Attachments whose media have one index share the medium."""
    device: str
    """The name of the link that the macvtap sits on: that of the VF, of the VLAN device; else as name."""
    state: str
    """That of device: "up", "no carrier", "down" or "missing"."""
    mtu: int
    mac: str
    nics: frozenset[tuple[str, str]] = frozenset()
    """Each NIC by which frames leave the node, with the VLAN ids of their tags there: ("eth1", ""), ("eth1", "100")."""
    reflects: bool | None = None
    """Whether the switch has reflective relay, by a probe that is still valid; None: not known."""
    probed: str = "not probed"
    filtering: bool = False
    """Whether it is a bridge with vlan_filtering."""
    vlans: Vlans | None = None
    """Of the bridge itself, if it has vlan_filtering."""
    firewalled: bool = False
    """Whether it is a bridge, and the node's firewall sees the IP packets between its ports (bridge-nf-call-*)."""
    embedded: str | None = None
    """What the embedded switch of the PF does: "bridge" or "vepa"; None without one."""


@dataclass(frozen=True)
class BridgePort:
    """The port by which a tap is on its bridge. master: the name of the bridge that it is on now."""

    name: str
    master: str | None
    forwarding: bool
    isolated: bool
    vlans: Vlans | None = None
    """If the bridge has vlan_filtering."""


@dataclass(frozen=True)
class End:
    """One attachment."""

    name: str
    """For people: "net1 of shop/web"."""
    id: str
    device: str
    """"macvtap" or "tap"."""
    mode: str | None
    """The link's mode now: a macvtap that waits for its guest is in vepa mode. None: a plain tap."""
    status: str
    """As in inventory.Attachment."""
    mac: str
    """The guest's."""
    link_mac: str
    mtu: int
    vlan: int | None = None
    addresses: tuple[str, ...] = ()
    waiting: bool = False
    elsewhere: bool = False
    """Whether its VM was heard from the wire while the link waited."""
    holders: tuple[str, ...] = ()
    """The processes that have its device open: "qemu-system-x86_64 23680"."""
    hidden: bool = False
    """Whether this process may not see which processes have a macvtap's device open: "idle" means nothing then."""
    to_guest: int | None = None
    """How many frames the guest was sent since the link was made; None: not known."""
    from_guest: int | None = None
    medium: Medium | None = None
    """None: a plain tap, or the link is gone."""
    bridge_port: BridgePort | None = None
    port: Port | None = None
    """The profile."""
    intact: bool | None = True
    """Whether the filters at the link are those of the profile; None: they cannot be read."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Reason → how many frames the filters have refused, without those that have refused none."""


@dataclass(frozen=True)
class Far:
    """An end that is no attachment of this node."""

    name: str
    """As it was given: a MAC or an IP address."""
    mac: str | None = None
    links: tuple[str, ...] = ()
    """The links of this node that have the MAC."""


@dataclass(frozen=True)
class Way:
    """What becomes of the frames from one end to the other. True: they arrive; None: not known."""

    sender: str
    receiver: str
    unicast: bool | None
    broadcast: bool | None
    path: str
    """Where they go, and why they do not arrive."""
    next_step: str = ""


@dataclass(frozen=True)
class Reason:
    """Why no frame passes, or what the answer depends on; and what to do about it."""

    text: str
    next_step: str = ""


@dataclass(frozen=True)
class Verdict:
    """verdict: CAN, CANNOT or MAY. reasons: those of CANNOT and MAY, the first of which is in the summary."""

    verdict: str
    summary: str
    reasons: tuple[Reason, ...]
    warnings: tuple[str, ...]
    ways: tuple[Way, ...]
    ends: tuple[End, ...]
    far: Far | None = None
    blocked: bool = False
    """Whether the reasons stop an end itself, wherever the other is: the ways are those of working ends."""

    @property
    def next_steps(self) -> tuple[str, ...]:
        """What to do, each once."""
        return tuple(dict.fromkeys(each.next_step for each in self.reasons if each.next_step))

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "verdict": self.verdict,
            "summary": self.summary,
            "blocked": self.blocked,
            "reasons": [each.text for each in self.reasons],
            "nextSteps": list(self.next_steps),
            "warnings": list(self.warnings),
            "ways": [
                {
                    "from": each.sender,
                    "to": each.receiver,
                    "unicast": each.unicast,
                    "broadcast": each.broadcast,
                    "path": each.path,
                }
                for each in self.ways
            ],
            "ends": [_end(each) for each in self.ends],
            "far": vars(self.far) if self.far else None,
        }


def _end(end: End) -> dict[str, Any]:
    medium, bridge_port, port = end.medium, end.bridge_port, end.port
    return {
        "name": end.name,
        "id": end.id,
        "device": end.device,
        "mode": end.mode,
        "waiting": end.waiting,
        "elsewhere": end.elsewhere,
        "status": end.status,
        "mac": end.mac,
        "linkMAC": end.link_mac,
        "mtu": end.mtu,
        "vlan": end.vlan,
        "addresses": list(end.addresses),
        "holders": list(end.holders),
        "toGuest": end.to_guest,
        "fromGuest": end.from_guest,
        "medium": {
            "name": medium.name,
            "device": medium.device,
            "state": medium.state,
            "mtu": medium.mtu,
            "nics": [{"nic": nic, "tags": tags} for nic, tags in sorted(medium.nics)],
            "reflects": medium.reflects,
            "probed": medium.probed,
            "vlanFiltering": medium.filtering,
            "firewalled": medium.firewalled,
            "switchMode": medium.embedded,
        }
        if medium
        else None,
        "bridgePort": {
            "name": bridge_port.name,
            "bridge": bridge_port.master,
            "forwarding": bridge_port.forwarding,
            "isolated": bridge_port.isolated,
            "pvid": bridge_port.vlans.pvid if bridge_port.vlans else None,
        }
        if bridge_port
        else None,
        "port": port.fields() if port else None,
        "filtersIntact": end.intact if port else None,
        "refused": dict(end.refused),
    }
