"""Ends the attachments that are over: their ADD was killed, or their namespace is gone."""

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
    from cni.kernel.rtnl import DeleteLink
    from cni.state.record import Record
    from cni.state.store import Store


class Records:
    """The attachments that the node has a record of."""

    def __init__(
        self,
        store: Store,
        delegate_seconds: float,
        delete_link: DeleteLink,
        workers: Workers,
        registry: Registry,
    ) -> None:
        self._store = store
        self._delegate_seconds = delegate_seconds
        self._delete_link = delete_link
        self._workers = workers
        self._ended = registry.counter(
            "vmtap_reconcile_ended_total", "Attachments that the reconciler ended.", "why"
        )
        self._lost = registry.gauge(
            "vmtap_reconcile_lost", "Attachments whose link is gone while their namespace lives."
        )

    def look(self, dead: set[int] | None, there: Collection[tuple[int, int, str]] = ()) -> None:
        """Hand on the attachments that are over.

        dead: only those of these namespaces; there: (nsid, index, alias) of links that need not be asked for again.
        """
        lost = 0
        with Rtnl() as host:
            for id in self._store.recorded():
                record = self._store.load(id)
                if record is None or (dead is not None and record.nsid not in dead):
                    continue
                seen = (record.nsid, record.ifindex, record.alias) in there
                why = self._over(host, record, seen=seen)
                if why == "lost":
                    lost += 1
                elif why:
                    self._workers.hand_on(id, partial(self._heal, id))
        if dead is None:
            self._lost.set(lost)

    def _over(self, host: Rtnl, record: Record, *, seen: bool = False) -> str | None:
        """Why the attachment is over: None if it is not, "lost" if that is not ours to say. seen: its link is there."""
        try:
            if not self._store.sealed(record.id):
                return "its ADD was killed"
            if seen:
                return None
            link = host.link(index=record.ifindex, nsid=record.nsid)
        except CniError:  # the record went meanwhile
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            link = None  # no namespace has the id any more
        # Another namespace may have been given the id; no link of it has both the index and the alias.
        if link and link.alias in (record.alias, ""):
            return None
        # The path has the last word: were we in another network namespace than the ADD, every id would mislead us.
        return "lost" if _leads_to(record.netns, record.netns_id) else "its namespace is gone"

    def _heal(self, id: str) -> None:
        with self._store.locked(id, wait=False), Rtnl() as host:
            record = self._store.load(id)
            why = self._over(host, record) if record else None
            if record is None or why in (None, "lost"):
                return
            env = {"PATH": os.environ.get("PATH", os.defpath)}
            delegate = delegate_of(record, env, self._delegate_seconds)
            failed = end(host, self._store, record, delegate, self._delete_link)
        if failed:
            self._workers.failed("attachment", "; ".join(map(str, failed)), **_names(record))
        else:
            self._ended.inc(str(why))
            log(INFO, "attachment ended", why=why, **_names(record))


def _leads_to(path: str, identity: tuple[int, int]) -> bool:
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
