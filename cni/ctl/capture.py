"""vmtapctl capture: the frames that a guest sends and receives, seen at its link by a packet socket.

The socket is in the pod's network namespace. It does not change the link: no promiscuous mode. On a macvtap, what the
guest sends has passed the port's filters, and what is for the guest has not reached them yet. On a tap it is the other
way round, because the filters are at the bridge's port. So a capture lacks the refused frames of one direction; the
summary has how many frames the port has refused.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime

from cni.ctl import capture_output, dissect, libpcap, pcapng
from cni.ctl.capture_output import Ended, EndedSoon, Output, Signals
from cni.errors import CniError, cut
from cni.kernel import bpf, netns
from cni.kernel.packet_ring import Ring
from cni.kernel.rtnl import Rtnl
from cni.names import escaped
from cni.port import guard
from cni.spec import NO_ATTACHMENT
from cni.state.lookup import find_link, opened_netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from cni.ctl.inventory import Attachment
    from cni.kernel.packet_ring import Captured
    from cni.state.record import Record

INCOMPLETE, ENDED = 1, 2
"""Exit statuses: the kernel lost frames; the attachment ended during the capture."""
_TEXT = 500
"""Characters of a text in the file."""
_LAST_SECONDS = 1.0
"""For frames that the kernel has when the capture ends: it hands them over in a tenth of this."""
_LOOK_SECONDS = 1.0
"""How often it looks whether the attachment is still there. The end of its link is an event."""


@dataclass(frozen=True)
class Wanted:
    """filter: "" for all frames. write: a file or "-"; None: lines for people. snap: most bytes of a frame.

    count, size: of frames and of bytes written; None: no limit. direction: "out" or "in" of the guest, or None.
    """

    filter: str
    write: str | None
    snap: int
    count: int | None
    seconds: float
    size: int | None
    direction: str | None


@dataclass(frozen=True)
class Summary:
    """ended: why the capture ended. refused: reason → frames that the port has refused meanwhile."""

    frames: int
    bytes: int
    drops: int
    refused: dict[str, int]
    seconds: float
    ended: str
    status: int

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {key: value for key, value in vars(self).items() if key != "status"}

    def lines(self) -> Iterator[str]:
        """The lines for people."""
        yield f"{self.frames} frames, {self.bytes} bytes, in {self.seconds:.1f} s: {self.ended}"
        if self.drops:
            yield f"{self.drops} frames are missing: the ring was full; use a FILTER, --snap or --write"
        if self.refused:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.refused.items())
            yield f"meanwhile the port has refused frames (not all are captured): {reasons}"


def run(found: Attachment, wanted: Wanted, *, as_json: bool) -> Summary:
    """Capture until a limit or a signal, or until the attachment or the reader ends. Raises CniError, OSError."""
    record = found.record
    judge = libpcap.compiled(wanted.filter, wanted.snap) if wanted.filter else None
    code = judge.code if judge else bpf.assemble([(bpf.BPF_RET_K, 0, 0, wanted.snap)])
    with ExitStack() as stack:
        host = stack.enter_context(Rtnl())
        namespace = stack.enter_context(opened_netns(record))
        if namespace is None:
            raise CniError(
                NO_ATTACHMENT,
                f"no path leads from here to the network namespace of {found.sandbox} ({record.netns}): "
                "run vmtapctl on the node itself",
            )
        ring = _opened(found, namespace, code, wanted.direction)
        stack.callback(ring.close)
        refused = _refused(record, namespace)
        signals = stack.enter_context(Signals())
        output = stack.enter_context(capture_output.opened(wanted.write, wanted.size, signals))
        write = _packet
        if wanted.write is None:
            write = _json_line if as_json else _line
        else:
            output.add(pcapng.head(record.ifname, _title(found), wanted.filter, wanted.snap))
        if not as_json:
            print(f"capturing {_title(found)}", file=sys.stderr, flush=True)
        capture = _Capture(record, host, ring, output, signals, wanted=wanted, judge=judge, write=write)
        began = time.monotonic()
        capture.run(began + wanted.seconds)
        _, drops = ring.counts()
        last = pcapng.statistics(time.time_ns(), capture.frames, drops) if wanted.write else b""
        if not output.end(last):
            capture.ended += ", and the reader has not taken everything"
        more = {
            why: count - refused.get(why, 0)
            for why, count in _refused(record, namespace).items()
            if count > refused.get(why, 0)
        }
        return Summary(
            frames=capture.frames,
            bytes=capture.bytes,
            drops=drops,
            refused=more,
            seconds=round(time.monotonic() - began, 3),
            ended=capture.ended,
            status=ENDED if capture.gone else INCOMPLETE if drops else 0,
        )


class _Capture:
    """ended: why run() has ended; gone: whether that is the end of the attachment."""

    def __init__(
        self,
        record: Record,
        host: Rtnl,
        ring: Ring,
        output: Output,
        signals: Signals,
        *,
        wanted: Wanted,
        judge: libpcap.Filter | None,
        write: Callable[[bytes, Captured, bool], bytes],
    ) -> None:
        self._record, self._host, self._ring, self._output = record, host, ring, output
        self._signals, self._wanted, self._judge, self._write = signals, wanted, judge, write
        self._sent_is_out = record.device == "macvtap"
        self._poll = select.poll()
        self._poll.register(ring, select.POLLIN)
        self._poll.register(output, 0)  # POLLERR: a pipe without a reader
        self.frames = self.bytes = 0
        self.ended, self.gone = "", False

    def run(self, until: float) -> None:
        """Capture until the monotonic time, or until something else ends it. Raises CniError, OSError."""
        try:
            self._output.flush()
            self._run(until)
            self.ended = f"--seconds {self._wanted.seconds:g} are over"
        except EndedSoon as why:
            self.ended = str(why)
        except Ended as why:
            self.ended = str(why)
            return
        self._ring.stop()
        self._output.hurry(_LAST_SECONDS)
        until = time.monotonic() + _LAST_SECONDS
        with suppress(Ended):  # a second signal
            while self._ring.counts()[0] and (left := until - time.monotonic()) > 0:
                self._wait(left)
                self._take()

    def _run(self, until: float) -> None:
        """Capture until the monotonic time. Raises Ended if something else ends it."""
        look = time.monotonic() + _LOOK_SECONDS
        while (left := until - time.monotonic()) > 0:
            events = self._wait(min(left, _LOOK_SECONDS))
            self._take()
            if self._output.fileno() in events:
                raise Ended("the reader has closed the pipe")
            failed = events.get(self._ring.fileno(), 0) & select.POLLERR
            if failed:
                self._ring.clear_error()
            if failed or time.monotonic() >= look:
                look = time.monotonic() + _LOOK_SECONDS
                if not self._is_there():
                    self.gone = True
                    raise EndedSoon("the attachment has ended")

    def _wait(self, seconds: float) -> dict[int, int]:
        """Wait for frames and other events; fd → events. Raises EndedSoon after a signal."""
        with self._signals.waiting():
            return dict(self._poll.poll(seconds * 1000))

    def _take(self) -> None:
        """Write the frames that are in the ring. Raises Ended at a limit."""
        count, snap = self._wanted.count, self._wanted.snap
        for block in self._ring.blocks():
            for each in block:
                if each.unjudged and self._judge and not self._judge.matches(each.data, each.size):
                    continue
                made = self._write(each.data[:snap], each, each.sent == self._sent_is_out)
                if not self._output.add(made):
                    self._output.flush()
                    raise Ended(f"--size {self._output.most} is reached")
                self.frames += 1
                self.bytes += each.size
                if self.frames == count:
                    self._output.flush()
                    raise Ended(f"--count {count} is reached")
            self._output.flush()

    def _is_there(self) -> bool:
        """Whether the link exists, and a path leads to its network namespace, which the packet socket keeps alive."""
        if find_link(self._host, self._record) is None:
            return False
        with suppress(OSError):
            status = os.stat(self._record.netns)
            if (status.st_dev, status.st_ino) == self._record.netns_id:
                return True
        with opened_netns(self._record) as namespace:
            return namespace is not None


def _opened(found: Attachment, namespace: int, code: bytes, direction: str | None) -> Ring:
    record, name = (
        found.record,
        found.link.name if found.link else "",
    )  # root in the pod may have renamed the link
    sent = None if direction is None else (direction == "out") == (record.device == "macvtap")
    try:
        with netns.entered(namespace):
            return Ring(name, record.ifindex, code, sent=sent)
    except PermissionError as error:
        raise PermissionError(error.errno, "a packet socket needs CAP_NET_RAW") from None


def _refused(record: Record, namespace: int) -> dict[str, int]:
    """guard.refused(); {} if the port has no filters, or they are gone."""
    with suppress(OSError, CniError), nullcontext() if record.device == "tap" else netns.entered(namespace):
        return guard.refused(record) if record.port else {}
    return {}


def _packet(data: bytes, captured: Captured, out: bool) -> bytes:
    return pcapng.frame(data, captured.size, captured.time, out=out)


def _line(data: bytes, captured: Captured, out: bool) -> bytes:
    found = dissect.seen(data)
    seconds, nanoseconds = divmod(captured.time, 10**9)
    vlans = "".join(f"VLAN {each}  " for each in found.vlans)
    return (
        f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{nanoseconds // 1000:06}  {'out' if out else 'in ':3}  "
        f"{found.source} > {found.destination}  {vlans}{found.protocol}  {captured.size}  {found.info}".rstrip()
        + "\n"
    ).encode()


def _json_line(data: bytes, captured: Captured, out: bool) -> bytes:
    found = dissect.seen(data)
    document = {
        "time": datetime.fromtimestamp(captured.time / 10**9).astimezone().isoformat(timespec="microseconds"),
        "direction": "out" if out else "in",
        "source": found.source,
        "destination": found.destination,
        "vlans": found.vlans,
        "ethertype": f"0x{found.ethertype:04x}",
        "size": captured.size,
        "info": found.info,
    }
    return json.dumps(document).encode() + b"\n"


def _title(found: Attachment) -> str:
    """What is captured, in one line."""
    record = found.record
    on = f" on {record.source}" if record.source else ""
    mode = f" {record.mode}" if record.mode else ""
    return escaped(cut(f"{record.ifname} of {record.owner}: {record.device}{mode}{on}, {record.mac}", _TEXT))
