"""Ends recorded attachments whose ADD was killed, or whose network namespace is gone."""

from __future__ import annotations

import errno
import os
from functools import partial
from logging import INFO

from cni.agent.log import log
from cni.attach.delete import delegate_of, end
from cni.errors import CniError
from cni.kernel import netns
from cni.kernel.rtnl import Rtnl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from cni.agent.metrics import Registry
    from cni.agent.reconcile.workers import Workers
    from cni.attach.call import Node
    from cni.state.record import Record


class Records:
    """The attachments that the node has a record of."""

    def __init__(self, node: Node, workers: Workers, registry: Registry) -> None:
        self._node = node
        self._store = node.store
        self._workers = workers
        self._ended = registry.counter(
            "vmtap_reconcile_ended_total", "Attachments that the reconciler ended.", "why"
        )
        self._lost = registry.gauge(
            "vmtap_reconcile_lost", "Attachments whose link is gone while their namespace lives."
        )

    def look(self, dead: set[int] | None, existing: Collection[tuple[int, int, str]] = ()) -> None:
        """Have the attachments ended that are over.

        dead: ids of network namespaces, to look at their attachments only, or None for all. existing: (nsid, index,
        alias) of links that are known to exist. Raises CniError, OSError.
        """
        lost = 0
        with Rtnl() as host:
            for id in self._store.recorded():
                record = self._store.load(id)
                if record is None or (dead is not None and record.nsid not in dead):
                    continue
                link_exists = (record.nsid, record.ifindex, record.alias) in existing
                why = self._over(host, record, link_exists=link_exists)
                if why == "lost":
                    lost += 1
                elif why:
                    self._workers.submit(id, partial(self._end, id))
        if dead is None:
            self._lost.set(lost)

    def _over(self, host: Rtnl, record: Record, *, link_exists: bool = False) -> str | None:
        """Why the attachment is over; None if it is not; "lost" if the link is gone but its namespace lives.

        link_exists: the link need not be looked up. Raises OSError.
        """
        try:
            if not self._store.sealed(record.id):
                return "its ADD was killed"
            if link_exists:
                return None
            link = host.link(index=record.ifindex, nsid=record.nsid)
        except CniError:  # the record was removed meanwhile
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            link = None  # EINVAL: no namespace has that id any more
        # The id may belong to another namespace by now, but no link there has both this index and this alias.
        if link and link.alias in (record.alias, ""):
            return None
        # An id is valid in the network namespace of this process only, a path is not: the path finds a pod that lives
        # even if the agent runs in another network namespace than the ADD did.
        return "lost" if _leads_to(record.netns, record.netns_id) else "its namespace is gone"

    def _end(self, id: str) -> None:
        with self._store.locked(id, wait=False), Rtnl() as host:
            record = self._store.load(id)
            why = self._over(host, record) if record else None
            if record is None or why in (None, "lost"):
                return
            env = {"PATH": os.environ.get("PATH", os.defpath)}
            delegate = delegate_of(record, env, self._node)
            failed = end(host, self._store, record, delegate, self._node.delete_link)
        if failed:
            self._workers.failed("attachment", "; ".join(map(str, failed)), **_names(record))
        else:
            self._ended.inc(str(why))
            log(INFO, "attachment ended", why=why, **_names(record))


def _leads_to(path: str, identity: tuple[int, int]) -> bool:
    """Whether path is the network namespace of that (st_dev, st_ino)."""
    try:
        fd = netns.open_path(path)
    except CniError:
        return False
    try:
        return netns.identity(fd) == identity
    finally:
        os.close(fd)


def _names(record: Record) -> dict[str, object]:
    return {"network": record.network, "container": record.container_id, "ifname": record.ifname}
