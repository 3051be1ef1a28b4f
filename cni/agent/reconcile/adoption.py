"""Adopts links of vmtap's without a record: makes the record from the link."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from functools import partial
from logging import WARNING

from cni.agent.log import log
from cni.dataclass import replace
from cni.errors import CniError
from cni.kernel import macvtap, netns
from cni.kernel.rtnl import Rtnl
from cni.lower import unrecorded
from cni.port import guard
from cni.state import cdi, deviceid
from cni.state.claims import Claims
from cni.state.lookup import namespace_paths, opened_netns
from cni.state.port_profile import Port
from cni.state.record import HANDOVER_GROUP, Record, boot_id, identifier, parse_alias
from cni.state.store import IFINDEX_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.agent.metrics import Registry
    from cni.agent.reconcile.workers import Workers
    from cni.attach.call import Node
    from cni.kernel.rtnl import Link

_DIGEST = re.compile(r"vmtap/([A-Za-z0-9][A-Za-z0-9_.\-]*-[0-9a-f]{24})")


class Links:
    """The links with an alias of vmtap's, in every network namespace that the host's has an id for."""

    def __init__(self, node: Node, workers: Workers, registry: Registry) -> None:
        self._store = node.store
        self._claims = Claims(node.store.folder)
        self._policy = node.policy
        self._allocated = node.allocated
        self._cdi = node.cdi
        self._workers = workers
        self._left_alone: set[tuple[int, int]] = set()
        """(nsid, index) of the links that cannot be adopted. Each is logged once."""
        self._adopted = registry.counter(
            "vmtap_reconcile_adopted_total", "Links without a record for which one was made."
        )
        registry.computed(
            "vmtap_reconcile_unrecorded",
            "Links of ours without a record, of which none can be made.",
            look=lambda: {(): len(self._left_alone)},
        )

    def look(self, unrecorded: dict[str, int], existing: set[tuple[int, int, str]]) -> None:
        """Have the links without a record adopted.

        Adds their attachment id → index to unrecorded, and (nsid, index, alias) of every link of vmtap's to existing.
        Both are valid, if incomplete, when this raises OSError or CniError.
        """
        without_record = set()
        recorded = set(self._store.recorded())
        with Rtnl() as host:
            own = _own_nsid(host)
            for nsid in host.nsids():
                if nsid == own:
                    continue
                try:
                    links = host.links(nsid=nsid)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # EINVAL: the namespace died meanwhile
                        raise
                    continue
                for link in links:
                    id = id_of(link.alias)
                    if id is None:
                        continue
                    existing.add((nsid, link.index, link.alias))
                    if id not in recorded and link.index >= IFINDEX_BASE:
                        unrecorded[id] = link.index
                        without_record.add((nsid, link.index))
                        self._workers.submit(id, partial(self._adopt, id, nsid, link))
        self._left_alone &= without_record

    def _adopt(self, id: str, nsid: int, seen: Link) -> None:
        """Make a record of the link if it is still as seen; else, or if that is not possible, leave it alone."""
        with self._store.locked(id, wait=False), Rtnl() as host:
            link = host.link(index=seen.index, nsid=nsid)
            if link is None or link.alias != seen.alias or self._store.load(id) or _elsewhere(host, link):
                return
            record = self._record_of(host, nsid, link)
            if record:
                record = self._of_claim(record)
            if record and _has_filters(record):
                record = replace(record, port=Port())
            if record and link.index >= deviceid.BASE and self._allocated:
                record = self._of_device(record, self._allocated().get(link.index))
            adopted = record is not None and self._store.adopt(record)
        fields = {"alias": link.alias, "ifindex": link.index}
        if adopted:
            self._adopted.inc()
            log(WARNING, "link without a record adopted", **fields)
        elif (nsid, link.index) not in self._left_alone:
            self._left_alone.add((nsid, link.index))
            log(WARNING, "link without a record left alone: DEL removes it, by its alias", **fields)

    def _record_of(self, host: Rtnl, nsid: int, link: Link) -> Record | None:
        """The record of an ADD that made this link, as far as the link shows it; None if no ADD makes such a link."""
        names = parse_alias(link.alias)
        mode = next((name for name, number in macvtap.MODES.items() if number == link.mode), None)
        namespace = _namespace(host, nsid)
        if names is None or link.kind != "macvtap" or mode is None or namespace is None:
            return None
        below = host.link(index=link.lower or 0)
        if below is None:
            return None
        lower = unrecorded.adopt(host, below, mode)
        network, container_id, ifname = names
        try:
            policy = self._policy()
        except CniError:
            policy = None
        entries = [each for each in policy.interfaces if lower.source.name in each.sources] if policy else []
        entry = entries[0] if len(entries) == 1 else None
        handover = link.group == HANDOVER_GROUP
        node = self._store.node(link.index)
        return Record(
            network=network,
            container_id=container_id,
            ifname=ifname,
            netns=namespace[0],
            netns_id=namespace[1],
            nsid=nsid,
            device="macvtap",
            ifindex=link.index,
            mac=link.mac,
            mtu=link.mtu,
            queues=1,
            boot_id=boot_id(),
            interface=entry.name if entry else None,
            source=lower.source.name,
            mode="bridge" if handover else lower.mode,
            handover=handover,
            node=node if os.path.exists(node) else None,
            vlan=lower.vlan,
            vf=lower.vf,
        )

    def _of_claim(self, record: Record) -> Record:
        """The record as one of a resource claim's device, if a prepared claim has its id and index."""
        claim = self._claims.load(record.container_id)
        for device in claim.devices if claim else ():
            if (device.network, device.ifname, device.ifindex) == (
                record.network,
                record.ifname,
                record.ifindex,
            ):
                return replace(record, claim=True, args=device.args)
        return record

    def _of_device(self, record: Record, device_id: str | None) -> Record | None:
        """The record with the kubelet's device of its index; None if the kubelet has allocated no such device.

        A pod with NET_ADMIN makes links with any index and alias, and must not use up the kubelet's devices.
        """
        if device_id is None:
            return None
        spec = cdi.path(self._cdi, device_id) if self._cdi else ""
        return replace(record, device_id=device_id, cdi=spec if os.path.exists(spec) else None)


def id_of(alias: str) -> str | None:
    """The attachment id of an alias of vmtap's, which contains the names or the id; None for another alias."""
    if names := parse_alias(alias):
        return identifier(*names)
    digest = _DIGEST.fullmatch(alias)
    return digest[1] if digest else None


def _has_filters(record: Record) -> bool:
    """Whether the link has filters. Which profile made them is not known: they stay as they are until DEL."""
    with suppress(OSError), opened_netns(record) as pod:
        if pod is not None:
            with netns.entered(pod):
                return guard.is_there(record)
    return False


def _elsewhere(host: Rtnl, link: Link) -> bool:
    """Whether a pod's link has a lower device that is not the host's: it is of another node on this machine.

    Nodes of kind are containers: each learns the others' namespaces by the veths that it shares a bridge with.
    """
    return link.lower is not None and (link.lower_nsid is None or link.lower_nsid != _own_nsid(host))


def _own_nsid(host: Rtnl) -> int | None:
    """The id of the host's network namespace in itself; None if it has none."""
    own = os.open(netns.OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return host.known_nsid(own)
    finally:
        os.close(own)


def _namespace(host: Rtnl, nsid: int) -> tuple[str, tuple[int, int]] | None:
    """A path of the network namespace of that id, and its (st_dev, st_ino); None if no path is visible here."""
    for path in namespace_paths():
        try:
            fd = netns.open_path(path)
        except (CniError, OSError):
            continue
        try:
            if host.known_nsid(fd) == nsid:
                return path, netns.identity(fd)
        finally:
            os.close(fd)
    return None
