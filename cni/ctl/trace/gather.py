"""Looks up the facts of a trace: the snapshot that list and tree take, and what it lacks of the two ends.

Must not judge: verdict.py does.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import replace
from itertools import product

from cni import spec
from cni.ctl import open_devices, snapshot
from cni.ctl.trace.facts import BridgePort, End, Far, Medium
from cni.ctl.trace.verdict import judge, judge_far
from cni.errors import CniError
from cni.kernel import bridge_vlans, macvtap, sysfs, vf
from cni.kernel.bridge_port import veth_names
from cni.kernel.rtnl import (
    IFF_LOWER_UP,
    IFF_UP,
    IFLA_INFO_DATA,
    IFLA_LINKINFO,
    RTEXT_FILTER_SKIP_STATS,
    Rtnl,
    attributes,
)
from cni.port import guard
from cni.state import probe_results
from cni.state.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cni.ctl.inventory import Attachment, Node
    from cni.ctl.locations import Settings
    from cni.ctl.trace.facts import Verdict
    from cni.kernel.bridge_vlans import Vlans
    from cni.kernel.rtnl import Link
    from cni.kernel.sysfs import Sysfs

_MOST_PAIRS = 64
_MODES = {number: name for name, number in macvtap.MODES.items()}
_FORWARDING = 3  # BR_STATE_FORWARDING
_IFLA_VLAN_ID = 1
_BRIDGE_NF = "/proc/sys/net/bridge/bridge-nf-call"
_DEPTH = 8
"""How many devices may lie on each other (MAX_NEST_DEV of linux/netdevice.h)."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def trace(settings: Settings, first: str, second: str) -> list[Verdict]:
    """A verdict for each pair of attachments that the names lead to; one name may be a MAC or address elsewhere.

    Raises CniError 4 if a name leads to several pods, or both to one attachment; NO_ATTACHMENT if neither leads to an
    attachment of this node, or one is no name, MAC or address; 5 if the state cannot be read. Raises OSError.
    """
    node = snapshot.take(settings)
    near, others = _one_pod(node, first), _one_pod(node, second)
    wrong, far = second if near else first, _far(second)
    if not near and others:
        near, others, far = others, near, _far(first)
    if not near or not (others or far):
        raise CniError(
            spec.NO_ATTACHMENT,
            f"no attachment of this node is named or belongs to {wrong!r}; an end that is on another node is given by "
            "its MAC or address, and vmtapctl trace is also run there",
        )
    pairs: dict[frozenset[str], tuple[Attachment, Attachment]] = {}
    for a, b in product(near, others):
        if a is not b:
            pairs.setdefault(frozenset((a.record.id, b.record.id)), (a, b))
    if others and not pairs:
        raise CniError(spec.INVALID_ENVIRONMENT, f"{first!r} and {second!r} are one attachment")
    if max(len(pairs), len(near)) > _MOST_PAIRS:
        raise CniError(
            spec.INVALID_ENVIRONMENT, f"these are {len(pairs)} pairs: name attachments as POD/IFNAME"
        )
    with Rtnl() as host, sysfs.mounted() as own:
        look = _Look(settings.run, node, host, own)
        ends = {each.record.id: look.end(each) for each in (*near, *others)}
        if others:
            return [judge(ends[a.record.id], ends[b.record.id]) for a, b in pairs.values()]
        assert far is not None  # noqa: S101 - checked above
        own_links = (link.name for link in look.links.values() if far.mac and link.mac == far.mac)
        known = Far(far.name, far.mac, tuple(own_links))
        return [judge_far(ends[each.record.id], known) for each in near]


def _one_pod(node: Node, name: str) -> list[Attachment]:
    """The attachments of the name. What a sandbox that has ended has left counts only if nothing else has the name."""
    found = node.find(name)
    if len({each.record.container_id for each in found}) > 1:
        found = [each for each in found if each.link] or found
    sandboxes = {each.record.container_id: each.sandbox for each in found}
    if len(sandboxes) > 1:
        named = ", ".join(sorted(f"{sandbox} ({id[:12]})" for id, sandbox in sandboxes.items())[:8])
        raise CniError(
            spec.INVALID_ENVIRONMENT,
            f"{name!r} names attachments of several pods: {named}; give a pod, POD/IFNAME or an id",
        )
    return found


def _far(name: str) -> Far | None:
    """The end that a MAC or an IP address names; None if it is neither."""
    if _MAC.fullmatch(name.lower()):
        return Far(name.lower(), name.lower())
    try:
        return Far(str(ipaddress.ip_address(name)))
    except ValueError:
        return None


class _Look:
    """Looks up ends. Sockets and sysfs are of the host's network namespace."""

    def __init__(self, run: str, node: Node, host: Rtnl, own: Sysfs) -> None:
        self._run = run
        self._node = node
        self._host = host
        self._own = own
        self.links: Mapping[int, Link] = {link.index: link for link in host.links()}
        self._vlans: Mapping[int, Vlans] | None = None

    def end(self, each: Attachment) -> End:
        """The facts of one attachment."""
        record, link = each.record, each.link
        name = f"{record.ifname} of {each.sandbox}"
        if link is None:
            return End(name, record.id, record.device, record.mode, each.status, record.mac, "", record.mtu)
        intact, refused = self._filters(each)
        mode = record.mode
        if record.device == "macvtap" and not record.vf:
            mode = _MODES.get(link.mode or 0, str(link.mode))
        return End(
            name=name,
            id=record.id,
            device=record.device,
            mode=mode,
            status=each.status,
            mac=record.mac,
            link_mac=link.mac,
            mtu=link.mtu,
            vlan=each.vlan,
            addresses=each.addresses,
            waiting=each.waiting,
            elsewhere=each.waiting and Store(self._run).is_elsewhere(record.id),
            hidden=record.device == "macvtap" and not open_devices.sees_others(),
            holders=tuple(f"{holder.program} {holder.pid}" for holder in each.holders),
            to_guest=each.to_guest.packets if each.to_guest else None,
            from_guest=each.from_guest.packets if each.from_guest else None,
            medium=self._medium(each, link),
            bridge_port=self._bridge_port(each) if record.device == "tap" and record.source else None,
            port=record.port,
            intact=intact,
            refused=refused,
        )

    def _medium(self, each: Attachment, link: Link) -> Medium | None:
        record = each.record
        if record.source is None:
            return None
        named = next(
            (other for other in self.links.values() if record.source in (other.name, *other.altnames)), None
        )
        if (
            record.device == "macvtap"
            and named
            and named.kind in ("macvlan", "macvtap")
            and named.lower_nsid is not None
        ):
            # The kernel takes that macvlan's lower device (macvlan_common_newlink), which is in a third namespace.
            return replace(
                self._shared(named, named, frozenset({(named.name, "")})), index=-(link.lower or 0)
            )
        below = named if record.device == "tap" else self.links.get(link.lower or 0)
        if below is None:
            return Medium(record.source, 0, record.source, "missing", 0, "")
        if record.vf and named:
            mode = vf.switch_mode(self._host, named.index)
            embedded = next((name for name, number in vf.SWITCH_MODES.items() if number == mode), record.mode)
            nics = frozenset({(named.name, str(each.vlan or ""))})
            return self._shared(named, below, nics, embedded=embedded)
        return self._shared(below, below, frozenset(self._nics(below)))

    def _shared(
        self,
        shared: Link,
        device: Link,
        nics: frozenset[tuple[str, str]],
        *,
        embedded: str | None = None,
    ) -> Medium:
        is_bridge = shared.kind == "bridge"
        filtering = is_bridge and bool(self._own.number(f"{shared.name}/bridge/vlan_filtering"))
        reflects, probed = self._probe(shared.name)
        state = "up" if device.flags & IFF_LOWER_UP else "no carrier"
        return Medium(
            name=shared.name,
            index=shared.index,
            device=device.name,
            state=state if device.flags & IFF_UP else "down",
            mtu=device.mtu,
            mac=shared.mac,
            nics=nics,
            reflects=reflects,
            probed=probed,
            filtering=filtering,
            vlans=self._vlans_of(shared.index) if filtering else None,
            firewalled=is_bridge
            and any(sysfs.read_number(f"{_BRIDGE_NF}-{each}") for each in ("iptables", "ip6tables")),
            embedded=embedded,
        )

    def _probe(self, device: str) -> tuple[bool | None, str]:
        known = probe_results.load(self._run, device)
        if known is None:
            return None, f"{device} was not probed since the node started"
        if known.carrier_changes != self._own.number(f"{device}/carrier_changes"):
            return None, f"the carrier of {device} has changed since it was probed, {known.time}"
        if known.reflects is None:
            return None, f"the probe of {device} had no result, {known.time}: {known.why}"
        return known.reflects, f"probed {known.time}"

    def _bridge_port(self, each: Attachment) -> BridgePort | None:
        name = veth_names(each.record.ifindex)[0]
        link = next((link for link in self.links.values() if link.name == name), None)
        if link is None:
            return None
        return BridgePort(
            name=name,
            master=master.name if (master := self.links.get(link.master or 0)) else None,
            forwarding=self._own.number(f"{name}/brport/state") == _FORWARDING,
            isolated=self._own.number(f"{name}/brport/isolated") == 1,
            vlans=self._vlans_of(link.index) if self._filters_vlans(link) else None,
        )

    def _filters_vlans(self, port: Link) -> bool:
        master = self.links.get(port.master or 0)
        return bool(master and self._own.number(f"{master.name}/bridge/vlan_filtering"))

    def _vlans_of(self, index: int) -> Vlans | None:
        if self._vlans is None:
            self._vlans = bridge_vlans.read(self._host)
        return self._vlans.get(index)

    def _nics(self, link: Link, tags: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
        """The NICs by which the link's frames leave, each with the VLAN ids of the tags that they get there."""
        below = [
            each
            for each in self.links.values()
            if each.master == link.index and not each.alias.startswith("vmtap/")
        ]
        if (
            not below
            and link.kind in ("vlan", "macvlan")
            and link.lower_nsid is None
            and (lower := self.links.get(link.lower or 0))
        ):
            below = [lower]
            if link.kind == "vlan":
                tags = ".".join(filter(None, (self._vlan_id(link), tags)))
        if depth == _DEPTH or not below:
            if link.kind != "bridge":
                yield link.name, tags
            return
        for each in below:
            yield from self._nics(each, tags, depth + 1)

    def _vlan_id(self, link: Link) -> str:
        info = attributes(self._host.details(link.index, RTEXT_FILTER_SKIP_STATS).get(IFLA_LINKINFO, b""))
        (number,) = struct.unpack("=H", attributes(info.get(IFLA_INFO_DATA, b""))[_IFLA_VLAN_ID][:2])
        return str(number)

    def _filters(self, each: Attachment) -> tuple[bool | None, dict[str, int]]:
        """Whether the filters are those of the profile (None: not known), and what they have refused."""
        if each.record.port is None:
            return True, {}
        try:
            with guard.reached(each.record) as there:
                if not there:
                    return None, {}
                counts = guard.refused(each.record)
                intact = guard.is_intact(each.record, there)
                return intact, {reason: count for reason, count in counts.items() if count}
        except (CniError, OSError):
            return None, {}
