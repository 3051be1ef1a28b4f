"""Adopts the links of ours without a record: one is made from the link."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from functools import partial
from logging import WARNING

from cni.agent.log import log
from cni.errors import CniError
from cni.kernel import macvtap, netns
from cni.kernel.rtnl import Rtnl
from cni.lower import unrecorded
from cni.state.record import Record, boot_id, identifier, parse_alias
from cni.state.store import IFINDEX_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cni.agent.metrics import Registry
    from cni.agent.reconcile.workers import Workers
    from cni.config.policy import Policy
    from cni.kernel.rtnl import Link
    from cni.state.store import Store

_DIGEST = re.compile(r"vmtap/([^/]+-[0-9a-f]{24})")


class Links:
    """The links that are marked as ours, in every namespace that the host's knows. policy: the node's."""

    def __init__(
        self, store: Store, policy: Callable[[], Policy | None], workers: Workers, registry: Registry
    ) -> None:
        self._store = store
        self._policy = policy
        self._workers = workers
        self._told: set[tuple[int, int]] = set()
        self._adopted = registry.counter(
            "vmtap_reconcile_adopted_total", "Links without a record for which one was made."
        )
        registry.computed(
            "vmtap_reconcile_unrecorded",
            "Links of ours without a record, of which none can be made.",
            look=lambda: {(): len(self._told)},
        )

    def look(self, unrecorded: dict[str, int], there: set[tuple[int, int, str]]) -> None:
        """Hand on the links of ours that no record speaks of.

        unrecorded gets their ids and indexes, there (nsid, index, alias) of all that are marked as ours.
        """
        seen = set()
        known = set(self._store.recorded())
        with Rtnl() as host:
            own = _own_nsid(host)
            for nsid in host.nsids():
                if nsid == own:
                    continue
                try:
                    links = host.links(nsid=nsid)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # that: it died meanwhile
                        raise
                    continue
                for link in links:
                    id = id_of(link.alias)
                    if id is None:
                        continue
                    there.add((nsid, link.index, link.alias))
                    if id not in known and link.index >= IFINDEX_BASE:
                        unrecorded[id] = link.index
                        seen.add((nsid, link.index))
                        self._workers.hand_on(id, partial(self._adopt, id, nsid, link))
        self._told &= seen

    def _adopt(self, id: str, nsid: int, seen: Link) -> None:
        with self._store.locked(id, wait=False), Rtnl() as host:
            link = host.link(index=seen.index, nsid=nsid)
            if link is None or link.alias != seen.alias or self._store.load(id):
                return
            record = self._record_of(host, nsid, link)
            adopted = record is not None and self._store.adopt(record)
        fields = {"alias": link.alias, "ifindex": link.index}
        if adopted:
            self._adopted.inc()
            log(WARNING, "link without a record adopted", **fields)
        elif (nsid, link.index) not in self._told:
            self._told.add((nsid, link.index))
            log(WARNING, "link without a record left alone: DEL removes it, by its alias", **fields)

    def _record_of(self, host: Rtnl, nsid: int, link: Link) -> Record | None:
        """A record as ADD would have left it, as far as the link tells; None if it is none that ADD made."""
        names = parse_alias(link.alias)
        mode = next((name for name, number in macvtap.MODES.items() if number == link.mode), None)
        found = _namespace(host, nsid)
        if (
            names is None
            or link.kind != "macvtap"
            or mode is None
            or found is None
            or link.lower_nsid != _own_nsid(host)
        ):
            return None
        below = host.link(index=link.lower or 0)
        if below is None:
            return None
        lower = unrecorded.adopt(host, below, mode)
        network, container_id, ifname = names
        try:
            known = self._policy()
        except CniError:
            known = None
        entries = (
            [each.name for each in known.interfaces if lower.source.name in each.sources] if known else []
        )
        node = self._store.node(link.index)
        return Record(
            network=network,
            container_id=container_id,
            ifname=ifname,
            netns=found[0],
            netns_id=found[1],
            nsid=nsid,
            device="macvtap",
            ifindex=link.index,
            mac=link.mac,
            mtu=link.mtu,
            queues=1,
            boot_id=boot_id(),
            interface=entries[0] if len(entries) == 1 else None,
            source=lower.source.name,
            mode=lower.mode,
            node=node if os.path.exists(node) else None,
            vlan=lower.vlan,
            vf=lower.vf,
        )


def id_of(mark: str) -> str | None:
    """The id that an alias of ours stands for."""
    if names := parse_alias(mark):
        return identifier(*names)
    digest = _DIGEST.fullmatch(mark)
    return digest[1] if digest else None


def _own_nsid(host: Rtnl) -> int | None:
    own = os.open(netns.OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return host.known_nsid(own)
    finally:
        os.close(own)


def _namespace(host: Rtnl, nsid: int) -> tuple[str, tuple[int, int]] | None:
    """A path of the namespace that has that id, and its identity; None if there is no path that we can see."""
    for path in _paths():
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


def _paths() -> Iterator[str]:
    """Where namespaces are mounted (proc_pid_mountinfo(5)), then those that only processes hold, each once."""
    seen = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            if fields[3].startswith("net:["):
                seen.add(fields[3])
                yield re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
    for name in os.listdir("/proc"):
        if name.isdecimal():
            path = f"/proc/{name}/ns/net"
            with suppress(OSError):
                if (there := os.readlink(path)) not in seen:
                    seen.add(there)
                    yield path
