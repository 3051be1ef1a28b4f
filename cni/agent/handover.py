"""Holds back macvtaps in bridge mode until their guest is heard, so that its neighbours do not lose a VM that moves.

While a VM migrates, two links have its MAC. A macvtap in bridge mode takes the frames that its neighbours on the node
send to its MAC, whether or not a guest reads them; one in vepa mode leaves them to the wire. So ADD makes the link of a
record with handover in vepa mode, and this module changes its mode:

    state      mode      begins when                                        ends when
    waiting    vepa      ADD has made the link; or the MAC announces        the guest sends a frame: here;
                         itself from the wire: the VM has left              the MAC is not heard from the wire: presumed
    presumed   bridge    the MAC was not heard from the wire for some       the MAC is heard from the wire: waiting
                         seconds; or an agent that starts finds it so
    here       bridge    the guest has sent a frame                         the MAC announces itself: waiting

The state outlives the agent: the link's mode is in the kernel, and a file in the store marks a link whose VM was heard
elsewhere. A forged announcement does no more than the table shows: the guest's next frame ends the wait, and a link
returns to waiting at most once in _AGAIN_SECONDS. The kernel filters the frames (kernel/packet.py), so nothing wakes up
while no VM moves. Must not be on the way of an ADD's answer.
"""

from __future__ import annotations

import errno
import select
import threading
import time
from contextlib import contextmanager
from logging import ERROR, INFO, WARNING
from queue import SimpleQueue

from cni.agent.guest_link import NEVER, GuestLink
from cni.agent.log import log
from cni.agent.made_links import MadeLinks
from cni.agent.wire_sockets import WireSockets
from cni.dataclass import replace
from cni.errors import CniError, reason
from cni.kernel import macvtap, packet
from cni.kernel.rtnl import Rtnl, mac_bytes
from cni.state.lookup import find_link, opened_netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from cni.agent.metrics import Registry
    from cni.state.record import Record
    from cni.state.store import Store

_SILENT_SECONDS = 5.0
"""How long a new link waits for a guest whose MAC is not heard from the wire."""
_ELSEWHERE_SECONDS = 600.0
"""How long it waits after its MAC was heard from the wire: a VM is copied for minutes, and may send no broadcast."""
_PATH_SECONDS = 10.0
"""How often the path of a waiting link's namespace is looked at: the sockets in it keep the namespace alive."""
_AGAIN_SECONDS = 1.0
"""From a guest's frame to the next return to waiting: QEMU announces for half a second."""
_DOWN_SECONDS = 0.1
"""From the event that a link was set down to the look at it: nearly always its DEL goes on meanwhile."""
_LISTEN_SECONDS = 0.1
"""From one change of the wire sockets' filters to the next: a thousand ADDs must not cost a thousand changes."""
_MESSAGES = {
    "waiting": "the VM has left: its link waits in vepa mode",
    "presumed": "no longer waiting for the guest: its link is in bridge mode",
    "here": "the VM is here: its link is in bridge mode",
}


class Handover:
    """Watches the links of the store's records from start() to stop()."""

    def __init__(self, store: Store, registry: Registry, *, seconds: float) -> None:
        """seconds: from one look at all records to the next."""
        self._store = store
        self._seconds = seconds
        self._guests: dict[str, GuestLink] = {}
        self._at: dict[tuple[int, bytes], GuestLink] = {}
        self._ears: dict[int, GuestLink] = {}
        self._made = MadeLinks()
        self._down: dict[str, GuestLink] = {}  # those that were set down, or are gone, by id
        self._down_until = NEVER  # monotonic seconds
        self._closing: SimpleQueue[socket.socket | None] = SimpleQueue()
        self._poll = select.epoll()
        self._wire = WireSockets(self._poll, self._closing.put)
        self._changed: set[int] = set()  # lower devices on which other MACs matter than before
        self._logged: dict[str, float] = {}  # when a step's failure was logged last; monotonic seconds
        self._changing = threading.Lock()  # held while a link's mode and its state differ
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, name="handover", daemon=True),
            threading.Thread(target=self._close, name="handover-close", daemon=True),
        ]
        registry.computed(
            "vmtap_handover_links",
            "Macvtaps that wait for their guest (waiting), have heard it (here), or wait no more (presumed).",
            "state",
            look=self._count,
        )
        text = "Changes of a link's state, by the new state and the reason."
        self._changes = registry.counter("vmtap_handover_changes_total", text, "state", "why")
        self._silence = registry.histogram(
            "vmtap_handover_silence_seconds",
            "left: from a guest's last frame on this node to its MAC's announcement from the wire; arrived: from the "
            "last frame of its MAC from the wire to its first frame on this node.",
            "vm",
        )

    def start(self) -> None:
        """Start. Finds the links in the records."""
        self._poll.register(self._made.fd, select.EPOLLIN)
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Stop. The links keep their modes: the next agent goes on."""
        self._stopping = True
        self._made.wake_now()
        for thread in self._threads:
            thread.join(seconds)

    def made(self, record: Record, pod_netns: int) -> None:
        """Note the link of an ADD that has succeeded, and dup(2) pod_netns. wake() is to be called after the answer."""
        if record.handover:
            self._made.note(record, pod_netns)

    def wake(self, *, busy: bool = False) -> None:
        """Have the links that made() has noted looked at; busy: a little later, as other requests wait."""
        self._made.wake(busy=busy)

    @contextmanager
    def mode_of(self, id: str) -> Iterator[str | None]:
        """The mode that the attachment's link is to have, and keeps in the block; None if it is not watched."""
        with self._changing:
            guest = self._guests.get(id)
            yield guest.mode if guest else None

    # The thread

    def _run(self) -> None:
        due = paths = listen = 0.0
        while not self._stopping:
            if (now := time.monotonic()) >= due:
                self._try(self._look_at_records)
                due = now + self._seconds
            if now >= paths:
                self._try(self._look_at_paths)
                paths = now + _PATH_SECONDS if self._ears else NEVER
            elif self._ears and paths == NEVER:
                paths = now + _PATH_SECONDS
            ends = min((each.until for each in self._guests.values()), default=NEVER)
            wake = min(due, paths, ends, self._down_until, listen if self._changed else NEVER)
            wait = max(0.0, wake - time.monotonic())
            for fd, _ in self._poll.poll(wait):
                if fd == self._made.fd:
                    self._made.clear()
                    self._try(self._look_at_made)
                elif fd in self._ears:
                    self._try(self._hear_guest, self._ears[fd])
                elif fd in self._wire:
                    self._try(self._hear_wire, fd)
            now = time.monotonic()
            if now >= self._down_until:
                self._try(self._look_at_down)
            for guest in [each for each in self._guests.values() if each.until <= now]:
                self._try(self._end_wait, guest)
            if self._changed and now >= listen:
                listen = now + _LISTEN_SECONDS
                for lower in tuple(self._changed):
                    self._try(self._listen, lower)
        self._end()

    def _end(self) -> None:
        for guest in self._guests.values():
            self._deafen(guest)
        self._wire.close()
        self._made.close()
        self._closing.put(None)
        self._poll.close()

    def _try(self, step: Callable[..., object], *args: object) -> None:
        """Run one step, of one link or device; its failure ends nothing else, and is logged once in _AGAIN_SECONDS."""
        try:
            step(*args)
        except Exception as error:
            now = time.monotonic()
            if now < self._logged.get(step.__name__, 0.0) + _AGAIN_SECONDS:
                return  # frames may begin a step thousands of times a second
            self._logged[step.__name__] = now
            if isinstance(error, CniError | OSError):
                what = "watching guests failed; it is tried again"
                log(WARNING, what, step=step.__name__, error=reason(error))
            else:
                log(
                    ERROR, "a fault in vmtapd itself: please report it", step=step.__name__, error=repr(error)
                )

    # Which links there are

    def _look_at_made(self) -> None:
        with Rtnl() as host:
            for record, pod in self._made.take():
                self._try(self._watch, host, record, pod)

    def _look_at_down(self) -> None:
        """Forget those links of _down that are gone."""
        self._down_until = NEVER
        with Rtnl() as host:
            while self._down:
                id, guest = self._down.popitem()
                if self._guests.get(id) is guest and find_link(host, guest.record) is None:
                    self._forget(guest)

    def _look_at_records(self) -> None:
        """Watch links that are not watched yet, and forget those that are gone."""
        with Rtnl() as host:
            ids = set(self._store.recorded())
            for id in self._guests.keys() - ids:
                self._forget(self._guests[id])
            self._store.sweep_elsewhere(ids)  # a DEL may have come between a frame and its mark
            for id in ids - self._made.ids():
                self._try(self._look_at_record, host, id)

    def _look_at_record(self, host: Rtnl, id: str) -> None:
        if guest := self._guests.get(id):
            link = find_link(host, guest.record)
            if link is None or link.lower != guest.lower:
                self._forget(guest)  # gone, or another link, which is watched at the next look
        elif (record := self._store.load(id)) and record.handover and self._store.sealed(id):
            with opened_netns(record) as pod:
                self._watch(host, record, pod)

    def _watch(self, host: Rtnl, record: Record, pod: int | None) -> None:
        """Begin to watch the record's link. pod: an fd of its network namespace, if it is known."""
        link = find_link(host, record)
        if link is None or link.lower is None:
            return
        if old := self._guests.get(record.id):
            self._forget(old)
        now = time.monotonic()
        waits = link.mode == macvtap.MODES["vepa"]
        guest = GuestLink(record, mac_bytes(record.mac), link.lower, begun=now)
        # Not "here": an agent that was away may have missed an announcement.
        guest.state = "waiting" if waits else "presumed"
        self._guests[record.id] = guest
        self._at[guest.lower, guest.mac] = guest
        self._changed.add(link.lower)
        if waits:
            elsewhere = self._store.is_elsewhere(record.id)
            guest.until = now + (_ELSEWHERE_SECONDS if elsewhere else _SILENT_SECONDS)
            self._listen_to(guest, pod)

    def _look_at_paths(self) -> None:
        """Let go of namespaces that nothing else may keep alive: a pod can end without a DEL."""
        for guest in list(self._ears.values()):
            self._try(self._look_at_path, guest)

    def _look_at_path(self, guest: GuestLink) -> None:
        with opened_netns(guest.record) as pod:
            if pod is None:
                self._change(guest, "presumed", "nothing else keeps its network namespace", NEVER)

    def _forget(self, guest: GuestLink) -> None:
        self._deafen(guest)
        guest.forget_frames()
        self._guests.pop(guest.record.id, None)
        if self._at.get((guest.lower, guest.mac)) is guest:
            del self._at[guest.lower, guest.mac]
        self._changed.add(guest.lower)

    # What is heard

    def _listen_to(self, guest: GuestLink, pod: int | None) -> None:
        """Open the guest's sockets, unless they are open."""
        if guest.ear is None and pod is not None:
            ear = guest.open(pod)
            self._ears[ear.fileno()] = guest
            self._poll.register(ear, select.EPOLLIN)

    def _deafen(self, guest: GuestLink) -> None:
        if guest.ear:
            self._poll.unregister(guest.ear)
            del self._ears[guest.ear.fileno()]
        guest.close(self._closing.put)

    def _hear_guest(self, guest: GuestLink) -> None:
        assert guest.ear is not None  # noqa: S101 - only a guest with an ear is in _ears
        try:
            guest.ear.recv(packet.KEPT_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENETDOWN:
                raise
            self._down[guest.record.id] = guest
            self._down_until = min(self._down_until, time.monotonic() + _DOWN_SECONDS)
            return
        now = time.monotonic()
        silent = None if guest.on_wire is None else now - guest.on_wire
        # Until the pause is over an announcement is only noted.
        until = now + _AGAIN_SECONDS
        self._change(guest, "here", "its guest was heard", until, silent)

    def _hear_wire(self, fd: int) -> None:
        for lower, frame in self._wire.frames(fd):
            if guest := self._at.get((lower, packet.source(frame))):
                self._heard_elsewhere(guest, frame)

    def _heard_elsewhere(self, guest: GuestLink, frame: bytes) -> None:
        """A frame with the guest's MAC has come from the wire."""
        now = time.monotonic()
        if guest.state == "waiting":
            if guest.on_wire is None:
                self._store.set_elsewhere(guest.record.id, True)
            guest.on_wire = now
            guest.until = now + _ELSEWHERE_SECONDS
        elif guest.state == "presumed":
            self._return(guest, "its MAC was heard from the wire", now)
        elif packet.announces(frame):
            if guest.until == NEVER:
                self._return(guest, "its MAC was announced from the wire", now)
            else:
                guest.on_wire = (
                    guest.on_wire or now
                )  # soon after the guest's frame: looked at after the pause

    def _return(self, guest: GuestLink, why: str, now: float) -> None:
        """Back to waiting: the VM is elsewhere."""
        with opened_netns(guest.record) as pod:
            self._listen_to(guest, pod)  # first: the guest's next frame must be heard
        since = now - (guest.on_wire or now)  # the announcement, if there was a pause
        silent = None if guest.silent is None else max(0.0, guest.silent - since)
        guest.begun = now
        if self._change(guest, "waiting", why, now + _ELSEWHERE_SECONDS, silent):
            self._store.set_elsewhere(guest.record.id, True)
            guest.on_wire = now

    def _end_wait(self, guest: GuestLink) -> None:
        """What the end of a state's time means."""
        now = time.monotonic()
        guest.until = now + _AGAIN_SECONDS  # in case that it fails
        if guest.state == "waiting":
            self._change(guest, "presumed", "its MAC was not heard from the wire", NEVER)
        elif guest.on_wire is not None:
            self._return(guest, "its MAC was announced from the wire", now)
        else:
            guest.until = NEVER

    def _change(
        self, guest: GuestLink, state: str, why: str, until: float, silent: float | None = None
    ) -> bool:
        """Put the link into that state, which ends at `until` without a frame. False: the link is gone.

        silent: seconds for which the moving VM was not heard, if they are known.
        """
        waited = time.monotonic() - guest.begun
        with self._changing:
            before, after = guest.mode, replace(guest, state=state).mode
            gone = after != before and not guest.set_mode(after)
            if not gone:
                guest.state, guest.until, guest.on_wire = state, until, None
        if gone:
            self._forget(guest)
            return False
        if state != "waiting":
            self._deafen(guest)
            self._store.set_elsewhere(guest.record.id, False)
        self._changed.add(guest.lower)
        self._changes.inc(state, why)
        fields = {"silent_seconds": round(silent, 3)} if silent is not None else {}
        guest.log(INFO, _MESSAGES[state], why=why, seconds=round(waited, 3), **fields)
        if silent is not None:
            self._silence.observe(silent, "left" if state == "waiting" else "arrived")
        return True

    # The sockets

    def _listen(self, lower: int) -> None:
        """Have the sockets of a lower device hear the MACs that matter now."""
        guests = [each for each in self._guests.values() if each.lower == lower]
        with Rtnl() as host:
            link = host.link(index=lower)
        # Without it, its macvtaps are deleted, too.
        every = frozenset(each.mac for each in guests if link)
        waiting = frozenset(each.mac for each in guests if link and each.state == "waiting")
        macs = {packet.ETH_P_RARP: every, packet.ETH_P_ARP: every, packet.ETH_P_ALL: waiting}
        self._wire.hear(lower, link.name if link else "", macs)
        self._changed.discard(lower)  # after a failure above it is tried again

    def _close(self) -> None:
        """Closing waits for the kernel, so another thread does it."""
        while closed := self._closing.get():
            closed.close()

    # What is shown

    def _count(self) -> dict[tuple[str, ...], float]:
        states = [each.state for each in list(self._guests.values())]
        return {(state,): states.count(state) for state in ("waiting", "presumed", "here")}
