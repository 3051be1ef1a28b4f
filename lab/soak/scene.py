"""What the pods of a soak have in common: the node and its agent, a delegate, the peer, and the runtime's calls.

Must not decide what is killed, and when.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cni
from lab.bench.contenders import TMPFS, Agent
from lab.frames import ETHERTYPE, Frame, packet_socket, unpack
from lab.process import Closing
from lab.wire import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SHIM = Path(cni.__file__).parent / "shim" / "vmtap"
HEALTH, METRICS = 9742, 9741
"""Ports on the node's loopback."""
_RECONCILE_SECONDS = 2
_WAIT_SECONDS = 20
"""VMTAP_WAIT: how long a request waits for an agent."""
_DELEGATE = """#!/bin/sh
cat > /dev/null
case $CNI_COMMAND in
ADD)
    echo "$CNI_CONTAINERID" > "{folder}/leases/$CNI_CONTAINERID"
    sleep 0.05
    echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "10.9.0.5/24"}}]}}'
    ;;
DEL) rm -f "{folder}/leases/$CNI_CONTAINERID" ;;
esac
"""


@dataclass(frozen=True)
class Attachment:
    """The arguments of a runtime's call."""

    netns: Path
    container: str
    config: Mapping[str, Any]
    ifname: str = "net1"


@dataclass(frozen=True)
class Answer:
    """The result of a call. begin, end: seconds of the monotonic clock; status: negative if the shim was killed."""

    status: int
    document: dict[str, Any]
    begin: float
    end: float

    @property
    def code(self) -> int:
        """The CNI error code; 0 for success, -1 if the shim printed nothing."""
        return 0 if self.status == 0 else int(self.document.get("code", -1))


class Scene(Closing):
    """The lab and a running agent. on_event: called with the name of each event."""

    def __init__(self, on_event: Callable[[str], None]) -> None:
        self._on_event = on_event
        with contextlib.ExitStack() as stack:
            self.folder = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix=f"vmtap-soak-{os.getpid()}-", dir=TMPFS)
                )
            )
            self.lab = stack.enter_context(Lab())
            self._write_delegate()
            flags = ["--health", f"127.0.0.1:{HEALTH}", "--metrics", f"127.0.0.1:{METRICS}"]
            self.agent = Agent(
                self.lab.node,
                [*flags, "--reconcile-seconds", str(_RECONCILE_SECONDS), "--drain-seconds", "5"],
            )
            stack.callback(self.agent.close)
            self._lock = threading.Lock()
            self._outages: list[tuple[float, float]] = []
            """From each kill of the agent until the next one was ready."""
            self._down: float | None = None
            self.peer_mac = str(self.lab.peer.links()["eth0"]["address"])
            self._wire = stack.enter_context(packet_socket(self.lab.peer, "eth0"))
            self._wire.settimeout(0.2)
            self._closing = threading.Event()
            sender = threading.Thread(target=self._send_back)
            sender.start()
            stack.callback(sender.join)
            stack.callback(self._closing.set)
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    # The agent

    @property
    def broker(self) -> Path:
        """The broker's socket."""
        return self.agent.run / "launcher" / "broker.sock"

    def kill_agent(self) -> None:
        """Kills the agent and starts another one on the same folder. Raises LabError if that does not get ready."""
        with self._lock:
            self._down = time.monotonic()
        self._on_event("agent")
        self.agent.kill()
        self.agent.start()
        with self._lock:
            self._outages.append((self._down, time.monotonic()))
            self._down = None

    def wait_for_agent(self) -> None:
        """Waits while no agent runs, at most as long as a request does."""
        until = time.monotonic() + _WAIT_SECONDS
        while self._down is not None and time.monotonic() < until:
            time.sleep(0.02)

    def outages(self, begin: float, end: float) -> tuple[bool, float]:
        """Whether the agent was killed or starting between two moments, and for how many seconds of them."""
        with self._lock:
            every = [*self._outages, *([(self._down, end)] if self._down is not None else [])]
        parts = [min(end, up) - max(begin, down) for down, up in every if down <= end and up >= begin]
        return bool(parts), sum(parts)

    @property
    def restarts(self) -> list[float]:
        """Seconds from each kill until the next agent was ready."""
        with self._lock:
            return [up - down for down, up in self._outages]

    # The runtime

    def call(
        self, command: str, attachment: Attachment, *, config: Mapping[str, Any] | None = None
    ) -> Answer:
        """One call of the shim, to its end."""
        return self.begin(command, attachment, config=config).end()

    def begin(self, command: str, attachment: Attachment, *, config: Mapping[str, Any] | None = None) -> Call:
        """A call of the shim that has begun."""
        return Call([SHIM], self.env(attachment) | {"CNI_COMMAND": command}, config or attachment.config)

    def env(self, attachment: Attachment) -> dict[str, str]:
        """The environment of a call, without CNI_COMMAND."""
        return {
            "PATH": os.environ["PATH"],
            "CNI_CONTAINERID": attachment.container,
            "CNI_NETNS": str(attachment.netns),
            "CNI_IFNAME": attachment.ifname,
            "CNI_PATH": str(self.folder / "delegates"),
            "VMTAP_RUN": str(self.agent.run),
            "VMTAP_WAIT": str(_WAIT_SECONDS),
        }

    # The delegate

    @property
    def leases(self) -> Path:
        """The folder with a file for each attachment that the delegate has leased an address to."""
        return self.folder / "leases"

    def kill_delegate(self, container: str) -> bool:
        """Kills the delegate that works on a container's ADD; whether there was one."""
        mark, killed = f"CNI_CONTAINERID={container}\0".encode(), False
        for pid in _descendants(self.agent.pid):
            with contextlib.suppress(OSError), _pidfd(pid) as fd:
                process = Path(f"/proc/{pid}")
                if (
                    mark in (process / "environ").read_bytes()
                    and b"soak-ipam" in (process / "cmdline").read_bytes()
                ):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    killed = True
        return killed

    def _write_delegate(self) -> None:
        self.leases.mkdir()
        program = self.folder / "delegates" / "soak-ipam"
        program.parent.mkdir()
        program.write_text(_DELEGATE.format(folder=self.folder))
        program.chmod(0o755)

    # The peer

    def _send_back(self) -> None:
        """Sends each frame back to where it came from."""
        while not self._closing.is_set():
            try:
                frame = unpack(self._wire.recv(1 << 16))
            except TimeoutError:
                continue
            if frame.ethertype == ETHERTYPE and frame.dst == self.peer_mac:
                self._wire.send(Frame(frame.src, self.peer_mac, frame.token).pack())


class Call:
    """A process of the shim."""

    def __init__(self, argv: list[Path], env: Mapping[str, str], config: Mapping[str, Any]) -> None:
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
        )
        assert self._process.stdin
        with self._process.stdin as stdin:  # a pipe has room for it
            stdin.write(json.dumps(config).encode())
        self._process.stdin = None  # else communicate() flushes it

    def end(self, kill_after: float | None = None) -> Answer:
        """Waits for its end. kill_after: seconds until it is killed."""
        try:
            out, _ = self._process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, _ = self._process.communicate()
        end = time.monotonic()
        try:
            document = json.loads(out or b"{}")
        except ValueError:
            document = {"msg": out.decode(errors="replace")}
        return Answer(self._process.returncode, document, self._begin, end)


def _descendants(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, _text(children).split()):
            yield child
            yield from _descendants(child)


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
