"""Looks at the agent while it runs, and at what is left when the pods have ended. Must not judge."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cni.kernel.rtnl import NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, attributes
from lab.soak.scene import HEALTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.soak.scene import Scene
    from lab.wire import Netns

PROBE_LIMIT = 10.0
"""Seconds after which a probe counts as failed."""
_NETLINK_NETFILTER, _TABLES, _GETTABLE = 12, 10 << 8, 1  # linux/netfilter/nf_tables.h
_LINK_KEYS = ("address", "mtu", "master", "promiscuity", "allmulti", "ifalias", "flags")


@dataclass(frozen=True)
class Sample:
    """The agent at one moment. memory, peak: resident KiB, and the most so far; fds, threads: their numbers."""

    time: float
    pid: int
    memory: int
    peak: int
    fds: int
    threads: int


def look(pid: int) -> Sample | None:
    """A sample of a process; None if it has ended."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        memory, peak = (int(status[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        fds = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, KeyError):
        return None
    return Sample(time.monotonic(), pid, memory, peak, fds, int(status["Threads"]))


class Watch(threading.Thread):
    """Samples the agent and probes /healthz, as a kubelet does, until stop is set."""

    def __init__(self, scene: Scene, every: float) -> None:
        super().__init__(name="watch")
        self.scene, self.every, self.stop = scene, every, threading.Event()
        self.samples: list[Sample] = []
        self.probes: list[tuple[float, float]] = []
        """End, and milliseconds until the answer 200, of each probe that no restart of the agent overlapped."""
        self.failed: list[str] = []

    def run(self) -> None:
        while not self.stop.wait(self.every):
            if sample := look(self.scene.agent.pid):
                self.samples.append(sample)
            begin = time.monotonic()
            why = self.scene.lab.node.call(_probe)
            end = time.monotonic()
            if self.scene.outages(begin - 1, end)[0]:  # ready, but the server of probes is the last to listen
                continue
            self.probes.append((end, (end - begin) * 1000))
            if why:
                self.failed.append(why)


def _probe() -> str | None:
    """Why /healthz does not answer 200."""
    try:
        with socket.create_connection(("127.0.0.1", HEALTH), PROBE_LIMIT) as connection:
            connection.settimeout(PROBE_LIMIT)
            connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            answer = b""
            while more := connection.recv(4096):
                answer += more
    except OSError as error:
        return f"/healthz: {error}"
    return None if answer.startswith(b"HTTP/1.1 200") else f"/healthz: {answer.decode(errors='replace')!r}"


def census(scene: Scene, pods: Sequence[Netns]) -> dict[str, Any]:
    """All that attachments may leave: links, tables, files, leases and processes."""
    run = scene.agent.run
    links = scene.lab.node.links()
    return {
        "links of the node": {
            name: {key: link.get(key) for key in _LINK_KEYS} for name, link in links.items()
        },
        "links of the pods": {str(pod.path): sorted(pod.links()) for pod in pods},
        "nf_tables": {str(pod.path): pod.call(_tables) for pod in pods},
        "state files": sorted(
            str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.name != "lock"
        )
        + sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_symlink()),
        "leases": sorted(os.listdir(scene.leases)),
        "processes": _processes(f"VMTAP_RUN={run}\0".encode()),
    }


def _tables() -> list[str]:
    """The nf_tables tables of the calling thread's namespace, also vmtap's notes of the last frame."""
    head = struct.Struct("=IHHIIBBH")  # struct nlmsghdr and struct nfgenmsg
    found: list[str] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.send(head.pack(head.size, _TABLES | _GETTABLE, NLM_F_REQUEST | NLM_F_DUMP, 1, 0, 0, 0, 0))
        while True:
            data = netlink.recv(1 << 16)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == NLMSG_DONE:
                    return sorted(found)
                if kind == _TABLES:
                    found.append(attributes(data[head.size : length])[1].rstrip(b"\0").decode())
                elif kind == 2:  # NLMSG_ERROR: without nf_tables there is none
                    return []
                data = data[length + 3 & ~3 :]


def _processes(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found
