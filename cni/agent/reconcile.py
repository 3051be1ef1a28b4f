"""The reconciler: ends what no runtime will ever end, and makes whole what a kill left; GC for where no GC comes.

It runs when the agent starts, when a namespace that the host's knows dies (RTM_DELNSID), and at intervals. What it does
with an attachment that nobody is working on (its lock is free; it is looked at again inside the lock):

    record                    link                    the namespace            →
    its ADD was killed        whatever there is       any                      ended
    its ADD came to its end   there, with its alias   any                      in use: nothing
    its ADD came to its end   gone                    its path leads to it     lost: reported; DEL is the runtime's
    its ADD came to its end   gone                    dead, or not to be found ended, with the delegate's DEL
    none                      macvtap, alias ours,    has a path               adopted: a record is made from the
                              index as ADD gives it                            link
    none                      any other of ours       any                      left alone and reported: DEL knows
                                                                               it by its alias

A link in a pod is never removed for want of a record: no kill can leave one so, only a lost state folder, and then
a guest may be using it. An adopted record knows no delegate; the runtime's DEL tells it.
Leftovers that no record speaks of are removed: interface indexes, half-written records, device nodes, the host's end of
a bridge port whose tap is gone, VLAN devices without a macvtap. DELs that the shim left in pending/ are carried out.
Must not wait for a lock: who holds it is a request, and sees to the attachment itself.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import re
import select
import socket
import stat
import struct
import threading
import time
from contextlib import suppress
from functools import partial
from logging import DEBUG, ERROR, INFO, WARNING

from cni.agent import wire
from cni.agent.log import log
from cni.attach import attachment
from cni.errors import CniError
from cni.kernel import macvtap, netns
from cni.kernel.rtnl import (
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_ROUTE,
    RTM_DELNSID,
    RTNLGRP_NSID,
    SOL_NETLINK,
    Rtnl,
    nsid_events,
)
from cni.lower import sriov, vlan
from cni.state.record import Record, boot_id, identifier, parse_alias
from cni.state.store import IFINDEX_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from cni.agent.metrics import Registry
    from cni.agent.wire import Asked
    from cni.config.policy import Policy
    from cni.kernel.rtnl import Link
    from cni.plugin import Response
    from cni.state.store import Store

_WORKERS = 4
"""Attachments that are ended at once: each may have a delegate that hangs until its deadline."""
_QUIET = 0.05
_GATHER = 0.5
"""Seconds: pods die in crowds, so wait for quiet after the first, but not for ever."""
_BEFORE_SERVING = 2.0
"""Seconds that start() waits for what is pending, so that a DEL goes before the ADD that follows it."""
_PENDING_SECONDS = 24 * 3600.0
"""How long a DEL that fails is tried again before it is set aside."""
_UNFINISHED_SECONDS = 60.0
_PORT = re.compile(r"vth([0-9a-f]{8})")
_DIGEST = re.compile(r"vmtap/([^/]+-[0-9a-f]{24})")


class Reconciler:
    """Heals the state of one node until stop().

    answer: carries out a request as the CNI socket does; policy: the node's policy, for the names of adopted links.
    """

    def __init__(
        self,
        store: Store,
        answer: Callable[[Asked], Response],
        policy: Callable[[], Policy | None],
        registry: Registry,
        *,
        seconds: float,
        delegate_seconds: float,
        delete_link: attachment.DeleteLink,
    ) -> None:
        self._store = store
        self._answer = answer
        self._policy = policy
        self._seconds = seconds
        self._delegate_seconds = delegate_seconds
        self._delete_link = delete_link
        self._pending = f"{store.folder}/pending"
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._at_work: set[str] = set()
        self._changed = threading.Condition()
        self._told: set[tuple[int, int]] = set()
        self._looking = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self._workers = [
            threading.Thread(target=self._work, name="heal", daemon=True) for _ in range(_WORKERS)
        ]
        self._stop, self._stopped = socket.socketpair()
        self._events = _nsid_events()

        self._ended = registry.counter(
            "vmtap_reconcile_ended_total", "Attachments that the reconciler ended.", "why"
        )
        self._adopted = registry.counter(
            "vmtap_reconcile_adopted_total", "Links without a record for which one was made."
        )
        self._removed = registry.counter(
            "vmtap_reconcile_leftovers_removed_total", "Leftovers that no record spoke of.", "kind"
        )
        self._done = registry.counter(
            "vmtap_reconcile_pending_done_total", "DELs carried out that came while the agent was away."
        )
        self._failed = registry.counter(
            "vmtap_reconcile_failures_total", "Steps that failed; each is tried again in the next run."
        )
        # Looked at when asked for: one that is counted up and down would be wrong whenever a worker is the quicker.
        registry.seen(
            "vmtap_reconcile_pending",
            "DELs that wait in the folder pending/.",
            look=lambda: {(): sum(not name.endswith((".new", ".bad")) for name in self._waiting())},
        )
        self._lost = registry.gauge(
            "vmtap_reconcile_lost", "Attachments whose link is gone while their namespace lives."
        )
        registry.seen(
            "vmtap_reconcile_unrecorded",
            "Links of ours without a record, of which none can be made.",
            look=lambda: {(): len(self._told)},
        )
        self._last = registry.gauge(
            "vmtap_reconcile_last_run_timestamp_seconds", "When the last full run ended, seconds since 1970."
        )
        self._took = registry.gauge(
            "vmtap_reconcile_last_run_duration_seconds",
            "How long the last full run took to look at everything.",
        )

    def start(self) -> None:
        """Begin, with what is pending; returns when that is done, or in hand and late. Before requests are served."""
        for worker in self._workers:
            worker.start()
        self._try("pending", self._look_at_pending)
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work, _BEFORE_SERVING)
        self._looking.start()

    def stop(self, seconds: float = 5.0) -> None:
        """End after what is at work, which is waited for that long."""
        until = time.monotonic() + seconds
        self._stop.close()
        self._looking.join(max(0.0, until - time.monotonic()))
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
        if not any(thread.is_alive() for thread in (self._looking, *self._workers)):
            self._stopped.close()
            self._events.close()

    # When

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
                    self._try("namespaces", self._look_at_records, dead)

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
        self._try("pending", self._look_at_pending)
        unrecorded: dict[str, int] = {}
        there: set[tuple[int, int, str]] = set()
        self._try("links", self._look_at_links, unrecorded, there)
        self._try("records", self._look_at_records, None, there)
        self._try("leftovers", self._look_at_leftovers, unrecorded)
        seconds = time.monotonic() - begin
        log(DEBUG, "reconciled", ms=round(seconds * 1000, 2))
        self._took.set(seconds)
        self._last.set(time.time())

    # What

    def _look_at_records(self, dead: set[int] | None, there: Collection[tuple[int, int, str]] = ()) -> None:
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
                    self._hand_on(id, partial(self._heal, id))
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
            delegate = attachment.delegate_of(record, env, self._delegate_seconds)
            failed = attachment.end(host, self._store, record, delegate, self._delete_link)
        if failed:
            self._fail("attachment", "; ".join(map(str, failed)), **_names(record))
        else:
            self._ended.inc(str(why))
            log(INFO, "attachment ended", why=why, **_names(record))

    def _look_at_links(self, unrecorded: dict[str, int], there: set[tuple[int, int, str]]) -> None:
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
                    id = _id_of(link.alias)
                    if id is None:
                        continue
                    there.add((nsid, link.index, link.alias))
                    if id not in known and link.index >= IFINDEX_BASE:
                        unrecorded[id] = link.index
                        seen.add((nsid, link.index))
                        self._hand_on(id, partial(self._adopt, id, nsid, link))
        self._told &= seen

    def _adopt(self, id: str, nsid: int, seen: Link) -> None:
        with self._store.locked(id, wait=False), Rtnl() as host:
            link = host.link(index=seen.index, nsid=nsid)
            if link is None or link.alias != seen.alias or self._store.load(id):
                return
            record = self._record_of(host, nsid, link)
            adopted = record is not None and self._store.adopt(record)
            if adopted and record and record.vf:
                self._store.hold_function(record.vf["pci"], record.id)
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
        lower = host.link(index=link.lower or 0)
        if lower is None:
            return None
        function = sriov.adopt(host, lower) if mode == "passthru" else None
        if function:
            lower, mode, _ = function
        shared = vlan.adopt(lower)
        if shared:
            lower = host.link(index=lower.lower or 0) or lower
        network, container_id, ifname = names
        try:
            known = self._policy()
        except CniError:
            known = None
        entries = [each.name for each in known.interfaces if lower.name in each.sources] if known else []
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
            source=lower.name,
            mode=mode,
            node=node if os.path.exists(node) else None,
            vlan=shared,
            vf=function[2] if function else None,
        )

    def _look_at_leftovers(self, unrecorded: dict[str, int]) -> None:
        """Hand on what no record speaks of, nor a link that might get one."""
        with Rtnl() as host:
            links = host.links()
            numbers: dict[str, list[int]] = {id: [] for id in self._store.unfinished()}
            for number, id in self._store.reserved():
                numbers.setdefault(id, []).append(number)
            kept = {*self._store.recorded(), *unrecorded}  # after what it is compared with
            for id in numbers.keys() - kept:
                self._hand_on(id, partial(self._forget, id, numbers[id]))
            for link in links:
                port, id = _PORT.fullmatch(link.name), _id_of(link.alias) or ""
                if port and id and id not in kept and link.kind == "veth":
                    self._hand_on(id, partial(self._remove_port, id, link))
            if shared := {link.name for link in links if vlan.is_marked(link)}:
                used = {each.vlan["device"] for each in self._store.records() if each.vlan}
                for name in shared - used:
                    self._hand_on(name, partial(self._remove_vlan, name))
        for number in self._store.sweep_nodes(keep=unrecorded.values()):
            self._removed.inc("node")
            log(INFO, "leftover removed", kind="node", ifindex=number)

    def _forget(self, id: str, numbers: list[int]) -> None:
        with self._store.locked(id, wait=False):
            if self._store.load(id):
                return
            self._store.forget_id(id, *numbers)
        self._removed.inc("state")
        log(INFO, "leftover removed", kind="state", id=id)

    def _remove_port(self, id: str, seen: Link) -> None:
        number = int(seen.name[3:], 16)
        with self._store.locked(id, wait=False), Rtnl() as host:
            if self._store.load(id):
                return
            if seen.lower_nsid is not None:
                with suppress(OSError):  # EINVAL: the namespace died, and the pair with it
                    if host.link(index=number, nsid=seen.lower_nsid):
                        return
            attachment.remove_port(host, number, seen.alias, self._delete_link)
        self._removed.inc("port")
        log(INFO, "leftover removed", kind="port", link=seen.name, alias=seen.alias)

    def _remove_vlan(self, name: str) -> None:
        with Rtnl() as host:
            removed = vlan.release(host, self._store, name, "", self._delete_link, wait=False)
        if removed:  # else a macvtap is on it still
            self._removed.inc("vlan")
            log(INFO, "leftover removed", kind="vlan", link=name)

    # What the shim left

    def _waiting(self) -> list[str]:
        """What is in pending/, the oldest first."""
        return sorted(os.listdir(self._pending)) if os.path.isdir(self._pending) else []

    def _look_at_pending(self) -> None:
        for name in self._waiting():
            path = f"{self._pending}/{name}"
            if name.endswith(".new"):
                with suppress(FileNotFoundError):
                    if time.time() - os.stat(path).st_mtime > _UNFINISHED_SECONDS:  # its shim was killed
                        os.unlink(path)
            elif not name.endswith(".bad"):
                self._hand_on(path, partial(self._carry_out, path))

    def _carry_out(self, path: str) -> None:
        try:
            data, status = _read(path)
            asked = wire.parse(data)
            if asked.env.get("CNI_COMMAND") != "DEL":
                raise wire.WireError("it is no DEL")
        except FileNotFoundError:
            return
        except wire.WireError as error:
            self._set_aside(path, str(error))
            return
        if self._added_since(asked, status.st_mtime_ns):
            self._remove(path)
            log(INFO, "pending DEL dropped: it was added again since", **_asked(asked))
            return
        response = self._answer(asked)
        if response.error is None:
            self._remove(path)
            self._done.inc()
            log(INFO, "pending DEL carried out", **_asked(asked))
        elif time.time() - status.st_mtime > _PENDING_SECONDS:
            self._set_aside(path, str(response.error))
        else:
            self._fail("pending DEL", str(response.error), **_asked(asked))

    def _added_since(self, asked: Asked, since_ns: int) -> bool:
        """Whether the attachment is of a later ADD than the DEL: a container that was restarted keeps its id."""
        try:
            network = json.loads(asked.stdin)["name"]
            id = identifier(network, asked.env["CNI_CONTAINERID"], asked.env["CNI_IFNAME"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        written = self._store.written_ns(id)
        return written is not None and written > since_ns

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):  # by an agent that is being replaced by us, or we by it
            os.unlink(path)

    def _set_aside(self, path: str, why: str) -> None:
        os.rename(path, f"{path}.bad")
        self._fail("pending request set aside, as NAME.bad", why, path=path)

    # How

    def _hand_on(self, key: str, job: Callable[[], None]) -> None:
        """To a worker, unless one has that key in hand already."""
        with self._changed:
            if key in self._at_work:
                return
            self._at_work.add(key)
        self._jobs.put((key, job))

    def _work(self) -> None:
        while work := self._jobs.get():
            key, job = work
            self._try(key, job)
            with self._changed:
                self._at_work.discard(key)
                self._changed.notify_all()

    def _try(self, what: str, step: Callable[..., None], *args: object) -> None:
        """Run one step; its failure is logged and counted, and ends nothing else."""
        try:
            step(*args)
        except BlockingIOError:  # a request has the attachment's lock: it is being seen to
            log(DEBUG, "left to a request", what=what)
        except (CniError, OSError) as error:
            self._fail(what, str(error))
        except Exception as error:
            self._failed.inc()
            log(ERROR, "a fault in the reconciler: please report it", what=what, error=repr(error))

    def _fail(self, what: str, error: str, **fields: object) -> None:
        self._failed.inc()
        log(WARNING, "reconciling failed; it is tried again", what=what, error=error, **fields)


def _nsid_events() -> socket.socket:
    """Tells of each namespace that the host's gives an id to, or that had one and dies."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
    events.bind((0, 0))  # one without an address of its own is taken for the sender, and told nothing
    events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_NSID)
    return events


def _own_nsid(host: Rtnl) -> int | None:
    own = os.open(netns.OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return host.known_nsid(own)
    finally:
        os.close(own)


def _leads_to(path: str, identity: tuple[int, int]) -> bool:
    try:
        fd = netns.open_path(path)
    except CniError:
        return False
    try:
        return netns.identity(fd) == identity
    finally:
        os.close(fd)


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


def _id_of(mark: str) -> str | None:
    """The id that an alias of ours stands for."""
    if names := parse_alias(mark):
        return identifier(*names)
    digest = _DIGEST.fullmatch(mark)
    return digest[1] if digest else None


def _read(path: str) -> tuple[bytes, os.stat_result]:
    """Raises FileNotFoundError, WireError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise wire.WireError(str(error)) from error
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise wire.WireError("it is no file of ours")
        return file.read(wire.ENV_LIMIT + wire.STDIN_LIMIT + struct.calcsize("=IIII")), status


def _names(record: Record) -> dict[str, object]:
    return {"network": record.network, "container": record.container_id, "ifname": record.ifname}


def _asked(asked: Asked) -> dict[str, object]:
    return {"container": asked.env.get("CNI_CONTAINERID"), "ifname": asked.env.get("CNI_IFNAME")}
