"""Puts back what somebody has changed of an attachment's link: its MAC, mode, alias, state (up) and filters.

Whoever has a macvtap's fd may change its MAC (SIOCSIFHWADDR needs no capability, macvtap.c), for example to the
gateway's, and then receives what its neighbours send there. NET_ADMIN in the pod may change everything. The kernel
reports each change of a link that is up (RTM_NEWLINK), also in a pod's network namespace, because ADD has given it an
id in the host's. A guest that uses another MAC than its link's changes nothing of the link. Filters are the part of
port_drift.py.

A link is put back _MOST times in _WINDOW seconds. The next change takes it down, for _DOWN_SECONDS, and twice as long
each time, unless only the filters of a tap were changed, which are the host's. The work is bounded: events are read
every _QUIET seconds, a link is changed once in _PAUSE seconds, and events that are lost (ENOBUFS) have all links looked
at, at most once in _LOST_SECONDS. Must not be on the way of a request.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from logging import ERROR, INFO, WARNING

from cni.agent import port_drift
from cni.agent.log import log
from cni.dataclass import dataclass, field
from cni.errors import CniError, reason
from cni.kernel import bpf, macvtap, netns
from cni.kernel.rtnl import (
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_IFALIAS,
    NETLINK_LISTEN_ALL_NSID,
    NETLINK_ROUTE,
    RTM_NEWLINK,
    RTM_SETLINK,
    RTMGRP_LINK,
    SOL_NETLINK,
    Rtnl,
    attr,
    link_message,
    mac_bytes,
    text,
)
from cni.state.lookup import opened_netns
from cni.state.store import IFINDEX_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cni.agent.handover import Handover
    from cni.agent.metrics import Registry
    from cni.kernel.rtnl import Link
    from cni.state.record import Record
    from cni.state.store import Store

_QUIET = 0.1
_PAUSE = 1.0
_MOST = 3
_WINDOW = 60.0
_DOWN_SECONDS = 300.0
_LOST_SECONDS = 5.0
_BUFFER = 1 << 21
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_AT_TYPE = 4  # nlmsghdr.nlmsg_type
_AT_IFINDEX = 16 + 4  # ifinfomsg.ifi_index
_EVENTS, _LOOKS = 4096, 64
"""How many events are read, and links looked at, before a pause of _QUIET."""
_KINDS = {"macvtap": "macvtap", "tap": "tun"}
_MODES = {number: name for name, number in macvtap.MODES.items()}


@dataclass
class _Past:
    """What has been done about one attachment. Times are monotonic seconds."""

    done: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST))
    """When the link was put back."""
    again: float = 0.0
    """Not before then."""
    down: float = 0.0
    """Until when the link is held down; 0: it is not."""
    times: int = 0
    """How often it has been."""


class Drift:
    """Watches the links of the store's records from start() to stop(). handover: knows the mode of those that wait."""

    def __init__(
        self, store: Store, registry: Registry, *, handover: Handover | None, seconds: float
    ) -> None:
        """seconds: from one look at all records to the next. Raises OSError without the capabilities for it."""
        self._events = _events()
        self._tables = port_drift.events()
        self._store = store
        self._handover = handover
        self._seconds = seconds
        self._past: dict[str, _Past] = {}
        self._later: dict[str, float] = {}  # attachment id → when to look again
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
        self._found = registry.counter(
            "vmtap_drift_total", "Changes of links by others than vmtap, which were put back.", "what"
        )
        for what in ("mac", "mode", "alias", "state", "port"):
            self._found.inc(what, by=0)  # an alert sees the first change only of a counter that is there
        registry.computed(
            "vmtap_drift_down",
            "Links that are held down because they were changed again and again.",
            look=lambda: {(): sum(past.down > 0 for past in list(self._past.values()))},
        )

    def start(self) -> None:
        """Start. Looks at all records."""
        self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Stop."""
        self._stop.close()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            self._stopped.close()
            self._events.close()
            if self._tables:
                self._tables.close()

    def _run(self) -> None:
        poll, stopped = select.poll(), select.poll()
        for each in filter(None, (self._events, self._tables, self._stopped)):
            poll.register(each, select.POLLIN)
        stopped.register(self._stopped, select.POLLIN)
        due = looked = 0.0
        while True:
            if (now := time.monotonic()) >= due:
                self._try(self._look_at_everything)
                due, looked = now + self._seconds, now
            wait = min([due, *self._later.values()]) - time.monotonic()
            poll.poll(max(0.0, wait) * 1000)
            # Most events are of an ADD, which is not to share the interpreter with what it has woken.
            if stopped.poll(_QUIET * 1000):
                return
            ids, lost = self._gather()
            if port_drift.is_removed(self._tables) or lost:
                due = min(due, looked + _LOST_SECONDS)
            now = time.monotonic()
            ids |= {id for id, at in self._later.items() if at <= now}
            for id in ids:
                self._later.pop(id, None)
            self._try(self._look, ids)

    def _try(self, step: Callable[..., None], *args: object) -> None:
        try:
            step(*args)
        except (CniError, OSError) as error:
            log(WARNING, "watching the links failed; it is tried again", error=reason(error))
        except Exception as error:
            log(ERROR, "a fault in vmtapd itself: please report it", error=repr(error))

    def _gather(self) -> tuple[set[str], bool]:
        """The attachments that the next events may concern, and whether there were more, or some were lost."""
        seen: set[int] = set()
        lost = False
        for _ in range(_EVENTS):
            try:
                data = self._events.recv(_AT_IFINDEX + 4)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
            else:
                seen.add(*struct.unpack_from("=i", data, _AT_IFINDEX))
        ids = [id for index in seen if (id := self._store.reserved_by(index))]
        return set(ids[:_LOOKS]), lost or len(ids) > _LOOKS

    def _look_at_everything(self) -> None:
        ids = set(self._store.recorded())
        for id in self._past.keys() - ids:
            del self._past[id]
        self._look(ids)

    def _look(self, ids: set[str]) -> None:
        if ids:
            with Rtnl() as host:
                for id in ids:
                    self._try(self._look_at, host, id)

    def _look_at(self, host: Rtnl, id: str) -> None:
        record = self._store.load(id)
        if record is None or not self._store.sealed(id):
            return
        try:
            link = host.link(index=record.ifindex, nsid=record.nsid)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the namespace has ended
                raise
            return
        if link is None or link.kind != _KINDS[record.device]:
            return
        past, now = self._past.get(id) or _Past(), time.monotonic()
        over = past.down and now >= past.down
        held = bool(past.down) and not over
        found = self._differences(record, link, held=held)
        if not found and not over:
            if held:
                self._later[id] = past.down
            return
        if now < past.again:
            self._later[id] = past.again
            return
        self._past[id] = past
        if over:
            past.down = 0.0
            past.done.clear()
            log(INFO, "the link is no longer held down", **_names(record))
        elif not held:
            for what in found:
                self._found.inc(what)
            of_the_host = record.device == "tap" and found.keys() == {"port"}  # no pod can change that
            if len(past.done) == _MOST and past.done[0] > now - _WINDOW and not of_the_host:
                past.down, held = now + _DOWN_SECONDS * 2**past.times, True
                past.times += 1
            self._report(record, found, past.down)
            past.done.append(now)
        past.again = now + (_QUIET if held else _PAUSE)
        self._later[id] = past.down if held else past.again  # also in case that it fails
        self._put_back(record, held=held)

    def _differences(self, record: Record, link: Link, *, held: bool) -> dict[str, tuple[object, object]]:
        """What differs from the record: name → (found, wanted). held: whether the link is to be down."""
        wanted: dict[str, tuple[object, object]] = {
            "alias": (link.alias, record.alias),
            "state": ("up" if link.flags & IFF_UP else "down", "down" if held else "up"),
        }
        if record.device == "macvtap":
            wanted["mac"] = (link.mac, record.mac)
            with self._mode(record) as mode:
                if mode:
                    wanted["mode"] = (_MODES.get(link.mode or 0), mode)
        if record.port:
            wanted["port"] = port_drift.found(record, link), port_drift.INTACT
        return {what: pair for what, pair in wanted.items() if pair[0] != pair[1]}

    @contextmanager
    def _mode(self, record: Record) -> Iterator[str | None]:
        """The mode that the link is to have, and keeps in the block; None if any will do, or none is known."""
        if record.vf or not record.handover:
            yield None if record.vf else record.mode
        elif self._handover:
            with self._handover.mode_of(record.id) as mode:
                yield mode
        else:
            yield None

    def _report(self, record: Record, found: Mapping[str, tuple[object, object]], down: float) -> None:
        changed = {what: f"{pair[0]}, wanted {pair[1]}" for what, pair in found.items()}
        if down:
            seconds = round(down - time.monotonic())
            msg = "the link is changed again and again, and is held down"
            log(ERROR, msg, changed=changed, seconds=seconds, **_names(record))
        else:
            log(WARNING, "the link was changed, and is put back", changed=changed, **_names(record))

    def _put_back(self, record: Record, *, held: bool) -> None:
        """Make the link as the record has it, and set it up, or down if it is held. Raises OSError, CniError."""
        with opened_netns(record) as pod, Rtnl() as host:
            if pod is None or host.known_nsid(pod) != record.nsid:
                return
            with netns.entered(pod):
                there = Rtnl()
            with there:
                link = there.link(index=record.ifindex)
                if link is None or link.kind != _KINDS[record.device]:
                    return
                failed: list[OSError | CniError] = []
                try:
                    port_drift.put_back(record, there, link)
                except (OSError, CniError) as error:
                    failed.append(error)
                failed += self._set(there, record, held=held or bool(failed))
        if failed:
            raise failed[0]

    def _set(self, there: Rtnl, record: Record, *, held: bool) -> Iterator[OSError]:
        """Send the messages, each on its own, as one that is refused must not keep another back. Yields the errors."""
        index = record.ifindex
        messages = [link_message(RTM_SETLINK, text(IFLA_IFALIAS, record.alias), index=index)]
        if record.device == "macvtap":
            messages.append(link_message(RTM_SETLINK, attr(IFLA_ADDRESS, mac_bytes(record.mac)), index=index))
        state = link_message(RTM_SETLINK, index=index, flags=0 if held else IFF_UP, change=IFF_UP)
        messages.insert(0 if held else len(messages), state)
        for message in messages:
            try:
                there.do(message)
            except OSError as error:
                yield error
        with self._mode(record) as mode:
            if mode and record.device == "macvtap":
                try:
                    macvtap.set_mode(there, index, mode)
                except OSError as error:
                    yield error


def _events() -> socket.socket:
    """A socket with an event for each change of a link with an index of vmtap's, in every namespace with an id."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
    events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    bpf.attach(
        events,
        bpf.assemble(
            (
                (bpf.BPF_LD_H_ABS, 0, 0, _AT_TYPE),
                (bpf.BPF_JEQ_K, 0, 3, int.from_bytes(struct.pack("=H", RTM_NEWLINK))),
                (bpf.BPF_LD_B_ABS, 0, 0, _AT_IFINDEX + (3 if sys.byteorder == "little" else 0)),
                (bpf.BPF_JGE_K, 0, 1, IFINDEX_BASE >> 24),
                (bpf.BPF_RET_K, 0, 0, _AT_IFINDEX + 4),
                (bpf.BPF_RET_K, 0, 0, 0),
            )
        ),
    )
    events.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
    events.bind((0, RTMGRP_LINK))
    return events


def _names(record: Record) -> dict[str, object]:
    return {"network": record.network, "container": record.container_id, "ifname": record.ifname}
