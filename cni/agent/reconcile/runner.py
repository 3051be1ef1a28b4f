"""When the reconciler looks, and at what."""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from logging import DEBUG

from cni.agent.log import log
from cni.agent.reconcile.leftovers import Leftovers
from cni.agent.reconcile.links import Links
from cni.agent.reconcile.pending import Pending
from cni.agent.reconcile.records import Records
from cni.agent.reconcile.workers import Workers
from cni.kernel.rtnl import (
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_ROUTE,
    RTM_DELNSID,
    RTNLGRP_NSID,
    SOL_NETLINK,
    nsid_events,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.metrics import Registry
    from cni.attach.call import Request
    from cni.config.policy import Policy
    from cni.kernel.rtnl import DeleteLink
    from cni.plugin import Response
    from cni.state.store import Store

_QUIET = 0.05
_GATHER = 0.5
"""Seconds: pods die in crowds, so wait for quiet after the first, but not for ever."""
_BEFORE_SERVING = 2.0
"""Seconds that start() waits for what is pending, so that a DEL goes before the ADD that follows it."""


class Reconciler:
    """Heals the state of one node until stop().

    answer: carries out a request as the CNI socket does; policy: the node's policy, for the names of adopted links.
    """

    def __init__(
        self,
        store: Store,
        answer: Callable[[Request], Response],
        policy: Callable[[], Policy | None],
        registry: Registry,
        *,
        seconds: float,
        delegate_seconds: float,
        delete_link: DeleteLink,
    ) -> None:
        self._seconds = seconds
        self._workers = Workers(registry)
        self._records = Records(store, delegate_seconds, delete_link, self._workers, registry)
        self._links = Links(store, policy, self._workers, registry)
        self._leftovers = Leftovers(store, delete_link, self._workers, registry)
        self._pending = Pending(store, answer, self._workers, registry)
        self._looking = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self._stop, self._stopped = socket.socketpair()
        self._events = _nsid_events()

        self._last = registry.gauge(
            "vmtap_reconcile_last_run_timestamp_seconds", "When the last full run ended, seconds since 1970."
        )
        self._took = registry.gauge(
            "vmtap_reconcile_last_run_duration_seconds",
            "How long the last full run took to look at everything.",
        )

    def start(self) -> None:
        """Begin, with what is pending; returns when that is done, or in hand and late. Before requests are served."""
        self._workers.start()
        self._workers.attempt("pending", self._pending.look)
        self._workers.wait_idle(_BEFORE_SERVING)
        self._looking.start()

    def stop(self, seconds: float = 5.0) -> None:
        """End after what is at work, which is waited for that long."""
        until = time.monotonic() + seconds
        self._stop.close()
        self._looking.join(max(0.0, until - time.monotonic()))
        if self._workers.stop(until) and not self._looking.is_alive():
            self._stopped.close()
            self._events.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        poll.register(self._stopped, select.POLLIN)
        due = 0.0
        while True:
            if (now := time.monotonic()) >= due:
                self._look_at_everything()
                due = now + self._seconds
            ready = {fd for fd, _ in poll.poll(max(0.0, due - time.monotonic()) * 1000)}
            if self._stopped.fileno() in ready:
                return
            if self._events.fileno() in ready:
                dead = self._gather()
                if dead is None:  # more than the socket could hold: we know not which
                    due = 0.0
                else:
                    self._workers.attempt("namespaces", self._records.look, dead)

    def _gather(self) -> set[int] | None:
        """The ids of the namespaces that died; None if some were missed."""
        dead: set[int] = set()
        until = time.monotonic() + _GATHER
        while select.select([self._events], [], [], _QUIET)[0] and time.monotonic() < until:
            try:
                data = self._events.recv(1 << 16)
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return None
                raise
            dead |= {nsid for kind, nsid in nsid_events(data) if kind == RTM_DELNSID}
        return dead

    def _look_at_everything(self) -> None:
        begin = time.monotonic()
        self._workers.attempt("pending", self._pending.look)
        unrecorded: dict[str, int] = {}
        there: set[tuple[int, int, str]] = set()
        self._workers.attempt("links", self._links.look, unrecorded, there)
        self._workers.attempt("records", self._records.look, None, there)
        self._workers.attempt("leftovers", self._leftovers.look, unrecorded)
        seconds = time.monotonic() - begin
        log(DEBUG, "reconciled", ms=round(seconds * 1000, 2))
        self._took.set(seconds)
        self._last.set(time.time())


def _nsid_events() -> socket.socket:
    """Tells of each namespace that the host's gives an id to, or that had one and dies."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
    events.bind((0, 0))  # one without an address of its own is taken for the sender, and told nothing
    events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_NSID)
    return events
