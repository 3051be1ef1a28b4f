"""Removes leftovers without a record: indexes, half-written records, device nodes, bridge ports and their filters, VLAN
devices.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from logging import INFO

from cni.agent.log import log
from cni.agent.reconcile.adoption import id_of
from cni.kernel import bridge_port, nft
from cni.kernel.rtnl import Rtnl
from cni.lower import unrecorded as lower
from cni.port import filter as filters
from cni.state.claims import Claims

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.agent.metrics import Registry
    from cni.agent.reconcile.workers import Workers
    from cni.attach.call import Node
    from cni.kernel.rtnl import Link


class Leftovers:
    """What is left on the host of attachments that have no record."""

    def __init__(self, node: Node, workers: Workers, registry: Registry) -> None:
        self._store = node.store
        self._claims = Claims(node.store.folder)
        self._delete_link = node.delete_link
        self._workers = workers
        self._removed = registry.counter(
            "vmtap_reconcile_leftovers_removed_total", "Leftovers that no record spoke of.", "kind"
        )

    def look(self, unrecorded: dict[str, int]) -> None:
        """Have leftovers removed that belong to no record.

        unrecorded: attachment id → index of links that may be adopted, whose belongings stay. Raises CniError, OSError.
        """
        tables = _tables()  # before the links: a table is made after its link
        with Rtnl() as host:
            links = host.links()
            numbers: dict[str, list[int]] = {id: [] for id in self._store.unfinished()}
            for number, id in self._store.reserved():
                numbers.setdefault(id, []).append(number)
            claimed = self._claims.reserved()
            kept = {*self._store.recorded(), *unrecorded}  # read last: an ADD meanwhile has a record by now
            for id in numbers.keys() - kept:
                if id not in claimed:
                    self._workers.submit(id, partial(self._forget, id, numbers[id]))
                elif os.path.lexists(self._store.node(claimed[id])):
                    self._workers.submit(id, partial(self._remove_node, id, claimed[id]))
            for link in links:
                tap, id = bridge_port.tap_of(link.name), id_of(link.alias) or ""
                if tap is not None and id and id not in kept and link.kind == "veth":
                    self._workers.submit(id, partial(self._remove_port, id, tap, link))
            for name in lower.leftovers(links, self._store.records()):
                self._workers.submit(name, partial(self._remove_device, name))
        names = {link.name for link in links}
        for name, handle in tables.items():
            if bridge_port.tap_of(name) is not None and name not in names:
                self._workers.submit(name, partial(self._remove_table, name, handle))
        for number in self._store.sweep_nodes(keep=unrecorded.values()):
            self._removed.inc("node")
            log(INFO, "leftover removed", kind="node", ifindex=number)

    def _forget(self, id: str, numbers: list[int]) -> None:
        """Remove what the state folder has of an attachment without a record. numbers: its interface indexes."""
        with self._store.locked(id, wait=False):
            if self._store.load(id) or id in self._claims.reserved():
                return
            self._store.forget_id(id, *numbers)
        self._removed.inc("state")
        log(INFO, "leftover removed", kind="state", id=id)

    def _remove_node(self, id: str, number: int) -> None:
        """Remove the device node of a claim that is not attached: its minor may be another pod's by now."""
        with self._store.locked(id, wait=False):
            if self._store.load(id):
                return
            self._store.remove_node(number)
        self._removed.inc("node")
        log(INFO, "leftover removed", kind="node", ifindex=number)

    def _remove_port(self, id: str, tap: int, seen: Link) -> None:
        """Remove the bridge port of an attachment whose tap, of that index, is gone."""
        with self._store.locked(id, wait=False), Rtnl() as host:
            if self._store.load(id):
                return
            if seen.lower_nsid is not None:
                with suppress(OSError):  # EINVAL: the namespace died, and the veth pair with it
                    if host.link(index=tap, nsid=seen.lower_nsid):
                        return
            bridge_port.remove(host, tap, seen.alias, self._delete_link)
        self._removed.inc("port")
        log(INFO, "leftover removed", kind="port", link=seen.name, alias=seen.alias)

    def _remove_table(self, name: str, handle: bytes) -> None:
        """Remove the filters of a bridge port that is gone, but not those of a later port of that name."""
        with nft.opened() as netlink, suppress(FileNotFoundError):
            nft.change(netlink, [nft.delete_this_table(handle)])
            self._removed.inc("filters")
            log(INFO, "leftover removed", kind="filters", link=name)

    def _remove_device(self, name: str) -> None:
        """Remove a VLAN device if no macvtap is on it."""
        with Rtnl() as host:
            removed = lower.remove(host, self._store, name, self._delete_link)
        if removed:
            self._removed.inc("vlan")
            log(INFO, "leftover removed", kind="vlan", link=name)


def _tables() -> dict[str, bytes]:
    """The links that have or had filters, with the handle of each table; {} without nf_tables."""
    with suppress(OSError), nft.opened() as netlink:
        return filters.tables(netlink)
    return {}
