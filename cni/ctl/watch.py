"""vmtapctl watch: prints changes of attachments. It waits for events of the kernel, and looks only after one.

- inotify(7): records, and the files of processes that got fds from the agent's broker;
- rtnetlink: links in every namespace that has an id in the node's: a link that is deleted with its pod, a NIC that
  loses its carrier, a tap that is opened;
- the process connector (execs.py): a launcher that has opened a macvtap and executes QEMU;
- a pidfd for every process that holds an attachment: readable when it ends.

There is no event of a process that opens a macvtap long after it has started (hot-plug without the agent). It is seen
at the next event. Must not change anything.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

from rich.console import Group
from rich.live import Live
from rich.text import Text

from cni.ctl import render, snapshot
from cni.ctl.execs import Execs
from cni.kernel import netns
from cni.kernel.rtnl import NETLINK_LISTEN_ALL_NSID, NETLINK_ROUTE, RTMGRP_LINK, SOL_NETLINK
from cni.state.store import IFINDEX_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime
    from typing import Any

    from rich.console import Console

    from cni.ctl.inventory import Attachment, Node
    from cni.ctl.locations import Settings

_IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x80, 0x100, 0x200
_IN_ONLYDIR = 0x01000000
_QUIET, _LONGEST = 0.05, 0.5
"""Seconds without an event before it looks; and the longest time from the first event until it looks."""
_LINES = 8


@dataclass(frozen=True)
class Event:
    """what: "present" (at the start), "attached", "changed" or "detached". was: the status before a change."""

    time: datetime
    what: str
    attachment: Attachment
    was: str | None = None

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "time": self.time.isoformat(timespec="milliseconds"),
            "event": self.what,
            "was": self.was,
            "attachment": self.attachment.document(),
        }

    def line(self) -> str:
        """The line for people."""
        each, record = self.attachment, self.attachment.record
        on = f" on {record.source}" if record.source else ""
        mode = f" {record.mode}" if record.mode else ""
        status = f"{self.was} → {each.state}" if self.was else each.state
        held = "".join(f", {holder.program} {holder.pid}" for holder in each.holders)
        after = f"  {status}{held}" if self.what != "detached" else ""
        return (
            f"{self.time:%H:%M:%S}  {self.what:<8}  {each.sandbox} {record.ifname}  "
            f"{record.device}{mode}{on}  {record.mac}{after}"
        )


def run(settings: Settings, *, as_json: bool) -> int:
    """Print events until SIGINT or SIGTERM. Raises CniError, OSError."""
    console = render.console()
    with ExitStack() as stack:
        news = stack.enter_context(_News(settings.run))
        live = None
        if console.is_terminal and not as_json:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        lines: deque[str] = deque(maxlen=_LINES)
        known: dict[str, Attachment] = {}
        first = True
        while True:
            node = snapshot.take(settings)
            events = list(compare(known, node, first=first))
            known = _settled(known, node)
            news.follow(holder.pid for each in known.values() for holder in each.holders)
            lines.extend(event.line() for event in events if event.what != "present")
            if live:
                live.update(_screen(console, node, lines), refresh=True)
            else:
                for event in events:
                    print(json.dumps(event.document(), ensure_ascii=False) if as_json else event.line())
                sys.stdout.flush()
            first = False
            if not news.wait():
                return 0


def compare(known: dict[str, Attachment], node: Node, *, first: bool = False) -> Iterator[Event]:
    """The events since `known`. An attachment in progress is taken as it was before."""
    now = _settled(known, node)
    for id, each in now.items():
        before = known.get(id)
        if before is None:
            yield Event(node.time, "present" if first else "attached", each)
        elif _visible(before) != _visible(each):
            yield Event(node.time, "changed", each, before.state)
    for id, each in known.items():
        if id not in now:
            yield Event(node.time, "detached", each)


def _settled(known: dict[str, Attachment], node: Node) -> dict[str, Attachment]:
    found = {}
    for each in node.attachments:
        id = each.record.id
        if each.status != "in progress":
            found[id] = each
        elif id in known:
            found[id] = known[id]
    return found


def _visible(each: Attachment) -> object:
    return each.state, {holder.pid for holder in each.holders}, each.record.ifindex


def _screen(out: Console, node: Node, lines: Iterable[str]) -> Group:
    used = sum(each.status == "in use" for each in node.attachments)
    title = Text.assemble(
        "node ",
        (node.name, "bold"),
        f"  {len(node.attachments)} attached, {used} in use, {node.time:%H:%M:%S}",
        ("  Ctrl-C ends", "dim"),
    )
    table = render.attachments(node.attachments, out, wide=False)
    return Group(title, table, *(Text(line, style="dim", overflow="fold") for line in lines))


class _News:
    """Waits for events: of state files, links, programs, processes and signals."""

    def __init__(self, folder: str) -> None:
        self._folders = (os.path.dirname(folder), folder, f"{folder}/attachments", f"{folder}/holders")
        self._poll = select.poll()
        self._pids: dict[int, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _News:
        self._inotify = _checked(netns.libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        self._stack.callback(os.close, self._inotify)
        self._look()
        self._links = self._stack.enter_context(
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
        )
        self._links.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
        self._links.bind((0, RTMGRP_LINK))
        woken, waker = socket.socketpair()
        self._woken = self._stack.enter_context(woken)
        self._stack.enter_context(waker)
        waker.setblocking(False)
        self._stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(waker.fileno()))
        for number in (signal.SIGINT, signal.SIGTERM):
            self._stack.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        self._execs: Execs | None = None
        with suppress(OSError):  # not in the first network namespace, or the kernel cannot
            self._execs = self._stack.enter_context(closing(Execs()))
            self._poll.register(self._execs, select.POLLIN)
        for fd in (self._inotify, self._links.fileno(), self._woken.fileno()):
            self._poll.register(fd, select.POLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        self.follow(())
        self._stack.close()

    def follow(self, pids: Iterable[int]) -> None:
        """Wait for the end of these processes, and of no others."""
        wanted = set(pids)
        for pid in self._pids.keys() - wanted:
            fd = self._pids.pop(pid)
            self._poll.unregister(fd)
            os.close(fd)
        for pid in wanted - self._pids.keys():
            with suppress(ProcessLookupError):  # its end is seen at the next event, which is its links'
                self._pids[pid] = os.pidfd_open(pid)
                self._poll.register(self._pids[pid], select.POLLIN)

    def wait(self) -> bool:
        """Wait for an event, and until no more follow. False after a signal to end."""
        happened: float | None = None
        while True:
            left = None
            if happened is not None:
                left = min(_QUIET, happened + _LONGEST - time.monotonic()) * 1000
                if left <= 0:
                    return True
            ready = {fd for fd, _ in self._poll.poll(left)}
            if not ready:
                return True
            if self._woken.fileno() in ready:
                return False
            relevant = self._inotify in ready and self._files()
            relevant |= self._links.fileno() in ready and self._messages()
            if self._execs and self._execs.fileno() in ready:
                relevant |= self._execs.relevant()
            for pid in [pid for pid, fd in self._pids.items() if fd in ready]:
                relevant = True
                fd = self._pids.pop(pid)
                self._poll.unregister(fd)
                os.close(fd)
            if relevant and happened is None:
                happened = time.monotonic()

    def _look(self) -> None:
        """Watch the folders that exist. The kernel does not add a watch twice."""
        for folder in self._folders:
            mask = _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR
            if netns.libc.inotify_add_watch(self._inotify, os.fsencode(folder), mask) < 0:
                code = ctypes.get_errno()
                if code != errno.ENOENT:
                    raise OSError(code, os.strerror(code), folder)

    def _files(self) -> bool:
        os.read(self._inotify, 1 << 16)
        self._look()
        return True

    def _messages(self) -> bool:
        """Whether a message concerns an attachment's link, or a link of the node's own namespace."""
        relevant = False
        while True:
            try:
                data, ancillary, _, _ = self._links.recvmsg(1 << 16, 64)
            except BlockingIOError:
                return relevant
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # that: there was more than we could take in
                    raise
                return True
            (index,) = struct.unpack_from("=i", data, 20)  # nlmsghdr, ifinfomsg.ifi_index
            relevant |= index >= IFINDEX_BASE or not ancillary


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
