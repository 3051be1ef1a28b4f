"""Decides when the reconciler looks at what."""

from __future__ import annotations

import select
import socket
import threading
import time
from logging import DEBUG

from cni.agent.log import log
from cni.agent.reconcile.adoption import Links
from cni.agent.reconcile.leftovers import Leftovers
from cni.agent.reconcile.minors import Minors
from cni.agent.reconcile.pending import Pending
from cni.agent.reconcile.records import Records
from cni.agent.reconcile.workers import Workers
from cni.kernel.rtnl import (
    EVENTS_LOST,
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

    from cni.agent.cgroups import Cgroups
    from cni.agent.metrics import Registry
    from cni.attach.call import Node, Request
    from cni.plugin import Response

_QUIET_SECONDS = 0.05
_GATHER_SECONDS = 0.5
"""Pods often end many at a time: after the first, gather until it is quiet, but no longer than this."""
_MINORS_SECONDS = 2.0
"""How often the entries of minors are looked at while there are any: a kubelet removes a pod's control group late."""
_PENDING_SECONDS = 2.0
"""How long start() waits for pending DELs, which should precede the ADDs that follow them."""


class Reconciler:
    """Repairs the state of the node until stop().

    answer: carries out a request as the CNI socket does; groups: of the pods; seconds: from one full run to the next.
    """

    def __init__(
        self,
        node: Node,
        answer: Callable[[Request], Response],
        groups: Cgroups,
        registry: Registry,
        *,
        seconds: float,
    ) -> None:
        self._seconds = seconds
        self._workers = Workers(registry)
        self._records = Records(node, self._workers, registry)
        self._links = Links(node, self._workers, registry)
        self._leftovers = Leftovers(node, self._workers, registry)
        self._minors = Minors(node, groups, registry)
        self._pending = Pending(node.store, answer, self._workers, registry)
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
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
        """Start. Call before requests are served: waits until pending DELs are done, at most _PENDING_SECONDS."""
        self._workers.start()
        self._workers.attempt("pending", self._pending.look)
        self._workers.wait_idle(_PENDING_SECONDS)
        self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Stop, and wait that long for the jobs that were submitted."""
        until = time.monotonic() + seconds
        self._stop.close()
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._workers.stop(until) and not self._thread.is_alive():
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
            wake = min(due, time.monotonic() + _MINORS_SECONDS) if self._minors.busy else due
            ready = {fd for fd, _ in poll.poll(max(0.0, wake - time.monotonic()) * 1000)}
            if self._stopped.fileno() in ready:
                return
            if self._events.fileno() in ready:
                dead = self._gather()
                if dead is None:  # events were lost: look at all
                    due = 0.0
                else:
                    self._workers.attempt("namespaces", self._records.look, dead)
            self._workers.attempt("minors", self._minors.look)

    def _gather(self) -> set[int] | None:
        """The ids of the namespaces that have died; None if events were lost."""
        dead: set[int] = set()
        until = time.monotonic() + _GATHER_SECONDS
        while select.select([self._events], [], [], _QUIET_SECONDS)[0] and time.monotonic() < until:
            try:
                events = [*nsid_events(self._events.recv(1 << 16))]
            except OSError as error:
                if error.errno in EVENTS_LOST:
                    return None
                raise
            dead |= {nsid for kind, nsid in events if kind == RTM_DELNSID}
        return dead

    def _look_at_everything(self) -> None:
        begin = time.monotonic()
        self._workers.attempt("pending", self._pending.look)
        unrecorded: dict[str, int] = {}
        existing: set[tuple[int, int, str]] = set()
        self._workers.attempt("links", self._links.look, unrecorded, existing)
        self._workers.attempt("records", self._records.look, None, existing)
        self._workers.attempt("leftovers", self._leftovers.look, unrecorded)
        self._workers.attempt("minors", self._minors.complete, unrecorded)
        self._workers.attempt("minors", self._minors.look)
        seconds = time.monotonic() - begin
        log(DEBUG, "reconciled", ms=round(seconds * 1000, 2))
        self._took.set(seconds)
        self._last.set(time.time())


def _nsid_events() -> socket.socket:
    """A socket with an event for each namespace that gets an id in the host's namespace, or had one and dies."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
    events.bind((0, 0))  # an unbound socket has port 0, the kernel's own, and receives no multicast
    events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_NSID)
    return events
