"""Metrics of each attachment: its traffic as its guest sees it, what was refused of it, and whose it is.

A link's counters are read with one message over its namespace's id. Those of its filters need a socket of the network
namespace that has them, so the calling thread enters it for a moment. All are read when somebody scrapes, at most once
in _FRESH seconds, and in at most one part in _SHARE of the time; scrapes in between get the last values. What is gone,
or cannot be read, is left out. Must not change anything, hold a lock, or be used by more than one thread.
"""

from __future__ import annotations

import struct
import time
from contextlib import suppress
from functools import partial

from cni.errors import CniError
from cni.kernel import netns
from cni.kernel.rtnl import IFLA_IFALIAS, IFLA_STATS64, Host
from cni.port import guard
from cni.state.launcher_pod import vm_name
from cni.state.lookup import opened_netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.agent.metrics import Labels, Registry
    from cni.state.record import Record
    from cni.state.store import Store

    Values = dict[Labels, float]

_FRESH = 5.0
_SHARE = 20
_STATS = struct.Struct("=8Q")  # the first members of struct rtnl_link_stats64, linux/if_link.h
_NAMES = ("namespace", "pod", "interface")
_COUNTERS = {
    "vmtap_attachment_bytes_total": "Bytes that a guest has sent (out), or that were for it (in).",
    "vmtap_attachment_packets_total": "Frames that a guest has sent (out), or that were for it (in).",
    "vmtap_attachment_drops_total": "Frames that a guest did not read in time (in), and invalid ones of its own (out).",
}
_REFUSED = "vmtap_attachment_refused_frames_total"
_INFO = "vmtap_attachment_info"


def declare(registry: Registry, store: Store) -> None:
    """Declare them on the registry."""
    reading = _Reading(store)
    for name, text in _COUNTERS.items():
        labels = (*_NAMES, "direction")
        registry.computed(name, text, *labels, look=partial(reading.of, name), kind="counter")
    registry.computed(
        _REFUSED,
        "Frames from and to a guest that its port profile has refused, by reason.",
        *(*_NAMES, "reason"),
        look=partial(reading.of, _REFUSED),
        kind="counter",
    )
    registry.computed(
        _INFO,
        "1 for each attachment with a link. vm: the VM of a KubeVirt launcher's pod, or else the pod.",
        *(*_NAMES, "mac", "vm", "network", "source", "mode", "device"),
        look=partial(reading.of, _INFO),
    )


class _Reading:
    """The values of the store's attachments."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._values: dict[str, Values] = {}
        self._again = 0.0

    def of(self, name: str) -> Values:
        """The values of the metric, by its labels; the mapping is another one when they have been read again."""
        if (begin := time.monotonic()) >= self._again:
            self._values = {each: {} for each in (*_COUNTERS, _REFUSED, _INFO)}
            with Host() as host:
                for record in self._newest():
                    with suppress(CniError, OSError):
                        self._add(host, record)
            now = time.monotonic()
            self._again = now + max(_FRESH, (now - begin) * _SHARE)
        return self._values[name]

    def _newest(self) -> list[Record]:
        """The records; of a pod that was replaced by one of its name, the newest, which alone the labels can tell."""
        found: dict[Labels, Record] = {}
        for record in self._store.records():
            there = found.setdefault(_names(record), record)
            if there is not record and self._written(there) < self._written(record):
                found[_names(record)] = record
        return list(found.values())

    def _written(self, record: Record) -> int:
        return self._store.written_ns(record.id) or 0

    def _add(self, host: Host, record: Record) -> None:
        """Add the attachment's values. Raises OSError, CniError."""
        link = host.details(record.ifindex, 0, record.nsid)
        stats = link.get(IFLA_STATS64, b"")
        alias = link.get(IFLA_IFALIAS, b"").rstrip(b"\0")
        if alias != record.alias.encode() or len(stats) < _STATS.size:
            return  # the id may be another namespace's now
        names = _names(record)
        vm = vm_name(names[1]) or names[1]
        more = (record.mac, vm, record.network, record.source or "", record.mode or "", record.device)
        self._values[_INFO][*names, *more] = 1
        received, sent = (_STATS.unpack_from(stats)[at::2] for at in (0, 1))
        # A macvtap sends what its guest sends, and a tap receives it.
        out, in_ = (sent, received) if record.device == "macvtap" else (received, sent)
        for direction, (packets, count, _, drops) in (("in", in_), ("out", out)):
            for metric, value in zip(_COUNTERS, (count, packets, drops), strict=True):
                self._values[metric][*names, direction] = value
        for reason, frames in _refused(host, record).items():
            self._values[_REFUSED][*names, reason] = frames


def _names(record: Record) -> Labels:
    return (*(record.pod or ("", record.container_id)), record.ifname)


def _refused(host: Host, record: Record) -> dict[str, int]:
    """Reason → frames; {} if no path leads to the namespace. Raises OSError, CniError."""
    if record.port is None:
        return {}
    if record.device == "tap":
        return guard.refused(record)
    with opened_netns(record, search=False) as pod:
        if pod is None:
            return {}
        with netns.entered(pod, host.fd):
            return guard.refused(record)
