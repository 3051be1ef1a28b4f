"""From the facts of two ends to the verdict: can they talk? Pure.

"Talk" means untagged Ethernet frames between the guests: unicast and broadcast both ways, because ARP and neighbour
discovery need broadcast and multicast. What the guests do with the frames, and rules that others have put at the links
(nftables, tc), are not known here.

Sources: drivers/net/macvlan.c (macvlan_queue_xmit, macvlan_handle_frame, macvlan_multicast_rx), net/bridge/br_forward.c
(should_deliver), br_vlan.c.
"""

from __future__ import annotations

from itertools import product

from cni.ctl.trace.facts import CAN, CANNOT, MAY, Reason, Verdict, Way
from cni.state.probe_results import MEND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cni.ctl.trace.facts import End, Far, Medium
    from cni.kernel.bridge_vlans import Vlans

_STATUS = {
    "gone": ("its link is gone: the pod ended without a DEL", "vmtapctl doctor"),
    "old": ("its record was made before this boot, and its link is gone", "vmtapctl doctor"),
    "in progress": ("an ADD or DEL is at work on it", "run trace again"),
    "down": (
        "its link is down",
        "set it up in the pod; if it goes down again, the agent holds it down, and the agent's log states why",
    ),
    "idle": (
        "no process has its device open: there is no guest that receives",
        "start the VM, or look at its log",
    ),
}
_NO_BROADCAST = (
    "no broadcast arrives, so ARP and neighbour discovery fail, and only static neighbour entries work"
)


def judge(a: End, b: End) -> Verdict:
    """Can the guests of these two attachments talk?"""
    blocked = [*_blocked(a), *_blocked(b)]
    if a.mac == b.mac:
        blocked.append(Reason(f"both have the MAC {a.mac}", "set `mac` in one network config"))
    ways = (_way(a, b), _way(b, a))
    reasons, verdict = blocked, CANNOT
    if not blocked:
        verdict = min((_of(way) for way in ways), key=(CANNOT, MAY, CAN).index)
        reasons = [Reason(_why(way), way.next_step) for way in ways if _of(way) == verdict != CAN]
        doubts = [*_doubts(a), *_doubts(b)]
        if verdict == MAY or (verdict == CAN and doubts):
            verdict, reasons = MAY, [*reasons, *doubts]
    reasons = list(dict.fromkeys(reasons))
    because = reasons[0].text if reasons else ways[0].path
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    summary = f"{a.name} {verdict} talk to {b.name}: {because}{more}"
    warnings = (*_warnings(a), *_warnings(b), *_mtus(a, b), *_firewall(a, b))
    return Verdict(verdict, summary, tuple(reasons), warnings, ways, (a, b), blocked=bool(blocked))


def judge_far(a: End, far: Far) -> Verdict:
    """As judge(); the other end is not an attachment of this node, so only this node's half is known."""
    reasons = list(_blocked(a))
    if far.mac == a.mac:
        reasons.append(Reason(f"both have the MAC {a.mac}", "set `mac` in one network config"))
    medium = a.medium
    if medium and not reasons and not medium.nics:
        reasons.append(Reason(f"{medium.name} has no NIC, so no frame of {a.name} leaves the node"))
    # macvlan never delivers to its lower device; but what the switch reflects to the NIC's own MAC, the host receives.
    below = medium and a.device == "macvtap" and medium.device in far.links
    if medium and below and medium.reflects is False:
        reasons.append(
            Reason(f"{far.name} is the MAC of {medium.device}, which the macvtap itself is on", MEND)
        )
    verdict = CANNOT if reasons else MAY
    where = f"to the wire by {_nics(medium)}" if medium else "to the pod's kernel"
    if not reasons:
        here, step = "it is not on this node", f"on the node that has it: vmtapctl trace {far.name} {a.mac}"
        if far.links:
            here = f"it is the MAC of this node's {', '.join(far.links)}"
            step = f"vmtapctl probe {medium.device}" if medium and below and medium.reflects is None else ""
        reasons = [Reason(f"depends on the network behind {a.name}; {here}", step), *_doubts(a)]
    arrives = False if verdict == CANNOT else None
    ways = (
        Way(a.name, far.name, arrives, arrives, where),
        Way(far.name, a.name, arrives, arrives, "from there"),
    )
    summary = f"{a.name} {verdict} talk to {far.name}: {reasons[0].text}"
    return Verdict(verdict, summary, tuple(reasons), tuple(_warnings(a)), ways, (a,), far)


def _of(way: Way) -> str:
    if way.unicast is False:
        return CANNOT
    return CAN if way.unicast and way.broadcast else MAY


def _why(way: Way) -> str:
    if way.unicast and way.broadcast is False:
        return f"{way.path}; from {way.sender} to {way.receiver} {_NO_BROADCAST}"
    return way.path


def _blocked(end: End) -> Iterator[Reason]:
    """Why no frame reaches or leaves the guest, wherever the other end is."""
    if end.status in _STATUS and not (end.status == "idle" and end.hidden):
        why, step = _STATUS[end.status]
        yield Reason(f"{end.name}: {why}", step)
        if end.status in ("gone", "old"):
            return
    medium = end.medium
    if medium and end.device == "macvtap" and (end.status == "no carrier" or medium.state != "up"):
        state = medium.state if medium.state != "up" else "no carrier"
        what = {"missing": "is not there", "down": "is down"}.get(state, "has no carrier")
        step = (
            f"ip link set {medium.device} up"
            if state == "down"
            else "look at the cable, and at the switch's port"
        )
        yield Reason(f"{end.name}: its lower device {medium.device} {what}, which stops its link, too", step)
    if medium and end.device == "tap":
        yield from _bridge_port(end, medium)
    if end.device == "macvtap" and end.link_mac != end.mac and end.link_mac:
        yield Reason(
            f"{end.name}: its link has the MAC {end.link_mac}, so no frame for its guest's, {end.mac}, is delivered",
            f"ip link set {end.name.partition(' ')[0]} address {end.mac}, in the pod; the agent does it within seconds",
        )


def _bridge_port(end: End, medium: Medium) -> Iterator[Reason]:
    port, anew = end.bridge_port, "give the pod a new sandbox"
    if port is None or port.master != medium.name:
        yield Reason(f"{end.name}: its host end is no port of {medium.name} any more", anew)
    elif medium.state == "down":
        yield Reason(f"{end.name}: its bridge {medium.name} is down", f"ip link set {medium.name} up")
    elif not port.forwarding:
        yield Reason(
            f"{end.name}: the bridge does not forward at its port {port.name}",
            f"bridge -d link show dev {port.name}",
        )


def _doubts(end: End) -> Iterator[Reason]:
    """What may keep the guest from talking, and no frame shows."""
    if end.status == "idle" and end.hidden:
        yield Reason(
            f"{end.name}: this process may not see whether its device is open", "run trace as the host's root"
        )
    if end.port is None:
        return
    if end.intact is None:
        yield Reason(f"{end.name}: its filters cannot be read")
    elif not end.intact:
        yield Reason(
            f"{end.name}: its filters are not those of its profile (port)",
            "the agent restores them; its log says when",
        )


def _warnings(end: End) -> Iterator[str]:
    if end.refused:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(end.refused.items()))
        yield f"{end.name}: its filters have refused frames since the link was made: {counts}"
    if end.waiting and end.elsewhere:
        yield f"{end.name}: its MAC was heard from the wire: the VM runs elsewhere, and has not arrived yet"
    if end.from_guest == 0 and end.status == "in use":
        yield f"{end.name}: its guest has sent no frame since the link was made"


def _firewall(a: End, b: End) -> Iterator[str]:
    one, two = a.medium, b.medium
    if one and two and one.index == two.index and one.firewalled and "tap" in (a.device, b.device):
        yield f"the node's firewall sees IP packets on {one.name} (bridge-nf-call-iptables), and may drop them"


def _mtus(a: End, b: End) -> Iterator[str]:
    if a.mtu != b.mtu:
        less, more = sorted((a, b), key=lambda end: end.mtu)
        yield f"{more.name} has MTU {more.mtu}, {less.name} {less.mtu}: longer frames than that may be lost"


# The ways


def _way(a: End, b: End) -> Way:
    """What becomes of a's frames for b, if both links work."""
    one, two = a.medium, b.medium
    if one is None or two is None:
        return _without_medium(a, b)
    if one.index != two.index:
        return _between_media(a, b, one, two)
    if one.embedded and two.embedded:
        return _embedded(a, b, one)
    if one.embedded or two.embedded:
        on = _both(a, b, *(f"is on {'its VF' if each.embedded else 'itself'}" for each in (one, two)))
        return Way(a.name, b.name, None, None, f"depends on the embedded switch of {one.name}: {on}")
    if "tap" in (a.device, b.device):
        return _bridge(a, b, one)
    return _macvlan(a, b, one)


def _without_medium(a: End, b: End) -> Way:
    without = sorted(end.name for end in (a, b) if end.medium is None and end.mode)
    if without:
        return Way(a.name, b.name, False, False, f"there is no link of {' and '.join(without)}")
    plain = " and ".join(sorted(end.name for end in (a, b) if end.medium is None))
    return Way(a.name, b.name, None, None, f"depends on the pod's kernel, in which a plain tap ends: {plain}")


def _macvlan(a: End, b: End, medium: Medium) -> Way:
    if a.mode == b.mode == "bridge":
        path = f"within the node, by the macvlan driver on {medium.name}: both are in bridge mode"
        return Way(a.name, b.name, True, True, path)
    known = {"bridge", "vepa", "pepa"}
    if not {a.mode, b.mode} <= known:
        modes = _both(a, b, f"is in mode {a.mode}", f"is in mode {b.mode}")
        return Way(a.name, b.name, None, None, f"{modes} on {medium.name}: vmtap makes no such pair")
    modes = _both(a, b, f"is in {a.mode} mode", f"is in {b.mode} mode")
    if a.mode == b.mode:
        modes = f"both are in {a.mode} mode"
    # To one MAC the mode of the receiver does not count: what comes from the wire is delivered.
    hears = {"vepa": ("vepa", "bridge"), "bridge": ("vepa",), "pepa": ()}[str(a.mode)]
    broadcast = medium.reflects if b.mode in hears else False
    return _reflected(a, b, medium, f"{_patience(a, b)}{modes} on {medium.device}", broadcast=broadcast)


def _patience(a: End, b: End) -> str:
    return "".join(
        f"{end.name} waits for its guest, in vepa mode until the guest sends a frame; "
        for end in sorted((a, b), key=lambda end: end.name)
        if end.waiting
    )


def _reflected(a: End, b: End, medium: Medium, why: str, *, broadcast: bool | None) -> Way:
    """Frames that need the switch to send them back."""
    probe = f"vmtapctl probe {medium.device if not medium.embedded else medium.name}"
    if medium.reflects:
        path = f"through the switch, which reflects ({medium.probed}): {why}"
        return Way(a.name, b.name, True, broadcast, path)
    if medium.reflects is False:
        path = f"{why}, and the switch does not reflect ({medium.probed})"
        step = "the agent sets bridge mode at the guest's first frame" if a.waiting or b.waiting else MEND
        return Way(a.name, b.name, False, False, path, step)
    path = f"depends on the switch behind {medium.name}, which would have to reflect ({medium.probed}): {why}"
    return Way(a.name, b.name, None, broadcast, path, probe)


def _embedded(a: End, b: End, pf: Medium) -> Way:
    if a.vlan != b.vlan:
        return _other_vlans(a, b, pf.name, str(a.vlan or "none"), str(b.vlan or "none"))
    if pf.embedded == "vepa":
        why = f"the embedded switch of {pf.name} is in vepa mode"
        return _reflected(a, b, pf, why, broadcast=pf.reflects)
    return Way(a.name, b.name, True, True, f"within the NIC, by the embedded switch of {pf.name}")


def _bridge(a: End, b: End, bridge: Medium) -> Way:
    """By a Linux bridge: from port to port, or between a port and the bridge device that a macvtap sits on."""
    if a.bridge_port and b.bridge_port and a.bridge_port.isolated and b.bridge_port.isolated:
        if bridge.reflects:
            path = f"depends on the switch, which reflects to {bridge.name}: both are isolated ports of it"
            return Way(a.name, b.name, None, None, path)
        path = f"both are isolated ports of the bridge {bridge.name} (mode pepa)"
        return Way(a.name, b.name, False, False, path)
    if bridge.filtering:
        sent, received = _vlans(a, bridge), _vlans(b, bridge)
        if sent is None or received is None:
            path = f"depends on the VLANs of the bridge {bridge.name}, which cannot be read"
            return Way(a.name, b.name, None, None, path, "bridge vlan show")
        if sent.pvid not in received.untagged:
            return _other_vlans(a, b, bridge.name, str(sent.pvid or "none"), str(received.pvid or "none"))
    return Way(a.name, b.name, True, True, f"within the node, by the bridge {bridge.name}")


def _vlans(end: End, bridge: Medium) -> Vlans | None:
    return end.bridge_port.vlans if end.bridge_port else bridge.vlans


def _between_media(a: End, b: End, one: Medium, two: Medium) -> Way:
    """Over two devices of the node, which only the network outside may connect."""
    if not one.nics or not two.nics:
        inside = sorted(medium.name for medium in (one, two) if not medium.nics)
        path = f"{' and '.join(inside)} has no NIC, so no frame leaves the node by it"
        return Way(a.name, b.name, False, False, path)
    filtering = one.filtering or two.filtering  # a bridge may tag the frames that leave it
    fitting = [
        (left, right) for left, right in product(one.nics, two.nics) if filtering or _may_meet(left, right)
    ]
    if not fitting:
        tags = [", ".join(sorted({tags or "none" for _, tags in medium.nics})) for medium in (one, two)]
        return _other_vlans(a, b, "the wire", *tags)
    path = f"depends on the switch: {_both(a, b, f'is on {_nics(one)}', f'is on {_nics(two)}')}"
    return Way(a.name, b.name, None, None, path)


def _may_meet(left: tuple[str, str], right: tuple[str, str]) -> bool:
    """Whether what leaves by one NIC with those tags may come in by the other with these.

    A port of a switch sends a VLAN's frames either with the tag or without, so what leaves a NIC without a tag does not
    come back to it with one. The ports of two NICs may differ in that.
    """
    (nic, tags), (other, others) = left, right
    return tags == others or (nic != other and not (tags and others))


def _other_vlans(a: End, b: End, where: str, one: str, two: str) -> Way:
    vlans = _both(a, b, f"is in VLAN {one}", f"is in VLAN {two}")
    path = f"{vlans} on {where}, and only a router connects different VLANs"
    step = "give both network configs one `vlan`, or route between the two"
    return Way(a.name, b.name, False, False, path, step)


def _both(a: End, b: End, one: str, two: str) -> str:
    """A clause of each end, in the order of their names, so that it is one text for both ways."""
    return ", ".join(f"{name} {clause}" for name, clause in sorted([(a.name, one), (b.name, two)]))


def _nics(medium: Medium) -> str:
    named: Iterable[str] = (f"{nic} VLAN {tags}" if tags else nic for nic, tags in sorted(medium.nics))
    return ", ".join(named) or medium.name
