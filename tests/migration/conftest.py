"""Two nodes, each with an agent, and a machine on one learning switch. A guest is a thread on an attachment's fd."""

from __future__ import annotations

import itertools
import os
import select
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cni.kernel import netns, tapdev
from cni.state.store import Store, in_netns
from lab.frames import ETHERTYPE, VNET_HEADER, Frame, mac_bytes, packet_socket
from lab.wire import NIC, Lab, Netns
from tests.agent.conftest import Agent
from tests.runner import config
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cni.state.record import Record

VM = "02:00:00:00:00:77"
_HEADER = bytes(VNET_HEADER)


def arp(mac: str, *, announcement: bool = False) -> bytes:
    """A broadcast ARP request of a guest; as an announcement it asks for its own address."""
    sender, target = bytes([10, 77, 0, 7]), bytes([10, 77, 0, 7 if announcement else 9])
    fixed = bytes.fromhex("0001080006040001")
    head = b"\xff" * 6 + mac_bytes(mac) + b"\x08\x06"
    return (head + fixed + mac_bytes(mac) + sender + bytes(6) + target).ljust(60, b"\0")


def rarp(mac: str) -> bytes:
    """What QEMU broadcasts when a guest has arrived (net/announce.c)."""
    fixed = bytes.fromhex("0001080006040003")
    address = mac_bytes(mac)
    return (b"\xff" * 6 + address + b"\x80\x35" + fixed + (address + bytes(4)) * 2).ljust(60, b"\0")


class Guest:
    """Answers every unicast frame on an attachment's fd, from start() to stop(), and sends what it is told to."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, *frames: bytes) -> Self:
        """Begin to answer, after sending these frames."""
        for frame in frames:
            self.send(frame)
        self._thread.start()
        return self

    def send(self, frame: bytes) -> None:
        os.write(self._fd, _HEADER + frame)

    def stop(self) -> None:
        """End it; a second call does nothing."""
        if self._stopped >= 0:
            os.close(self._stopped)
            self._stopped = -1
            if self._thread.ident:
                self._thread.join()
            os.close(self._stop)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop, select.POLLHUP)
        while self._stop not in (ready := {fd for fd, _ in poll.poll()}):
            assert ready
            frame = os.read(self._fd, 1 << 16)[VNET_HEADER:]
            if not frame[0] & 1 and frame[12:14] == ETHERTYPE.to_bytes(2):
                os.write(self._fd, _HEADER + frame[6:12] + frame[:6] + frame[12:])


@dataclass
class Attached:
    """An attachment on a node of the bed."""

    node: Node
    pod: Netns
    container: str
    fields: dict[str, Any]
    record: Record
    fd: int
    """Of its queue."""

    @property
    def mode(self) -> str:
        """The mode that the link has now."""
        mode: str = self.pod.links()["net1"]["linkinfo"]["info_data"]["mode"]
        return mode

    @property
    def elsewhere(self) -> bool:
        """Whether the agent has noted that the VM runs elsewhere."""
        return Store(self.node.agent.run).is_elsewhere(self.record.id)

    def close(self) -> None:
        """Close the fd; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def delete(self) -> None:
        """DEL."""
        self.node.agent.shim()("DEL", config(**self.fields), netns=self.pod, container=self.container).ok()


class Correspondent:
    """Somebody who exchanges frames with the VM, one after the other, and counts those without an answer."""

    def __init__(self, port: int | socket.socket, mac: str) -> None:
        self.port, self.mac = port, mac
        self._sent = 0

    def lost(self, mac: str = VM, frames: int = 5, seconds: float = LIMIT) -> int:
        """How many of so many frames to that MAC get no answer; seconds: how long each waits for one."""
        return sum(not self._exchange(mac, seconds) for _ in range(frames))

    def _exchange(self, mac: str, seconds: float) -> bool:
        self._sent += 1
        token = f"{self.mac} {self._sent}"
        raw = Frame(mac, self.mac, token).pack()
        if isinstance(self.port, int):
            os.write(self.port, _HEADER + raw)
        else:
            self.port.send(raw)
        fd = self.port if isinstance(self.port, int) else self.port.fileno()
        skip = VNET_HEADER if isinstance(self.port, int) else 0
        while select.select([fd], [], [], seconds)[0]:
            answer = os.read(fd, 1 << 16)[skip:]
            if (
                answer[:6] == mac_bytes(self.mac)
                and answer[14:].rstrip(b"\0").decode(errors="replace") == token
            ):
                return True
        return False


@dataclass
class Node:
    """One node of the bed, with its agent."""

    bed: Bed
    netns: Netns
    agent: Agent
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def attach(self, mac: str = VM, **fields: Any) -> Attached:
        """ADD of a pod of its own, and the fd of its queue."""
        container = f"c{next(self.numbers)}"
        fields = {"source": NIC, "mode": "bridge", "mac": mac, **self.bed.fields, **fields}
        fields = {key: value for key, value in fields.items() if value is not None}
        pod = self.bed.stack.enter_context(Netns("pod"))
        self.agent.shim()("ADD", config(**fields), netns=pod, container=container).ok()
        fd = netns.open_path(str(pod.path))
        try:
            (record,) = in_netns(self.agent.run, netns.identity(fd))
            (queue,) = tapdev.open_queues(fd, record, 1)
        finally:
            os.close(fd)
        made = Attached(self, pod, container, fields, record, queue)
        self.bed.stack.callback(made.close)
        if record.device == "tap":  # it gets a carrier with its first reader
            pod.wait_until_up(record.ifname)
            self.netns.wait_until_up(f"vth{record.ifindex:08x}")
        return made

    def neighbour(self, **fields: Any) -> Correspondent:
        """A VM of this node that speaks at once, and that the agent has heard."""
        mac = f"02:00:00:00:01:{len(self.bed.macs):02x}"
        self.bed.macs.append(mac)
        made = self.attach(mac, **fields)

        def speaks() -> str:
            os.write(made.fd, _HEADER + arp(mac))
            return made.mode if made.record.handover else "bridge"

        until(speaks, "the agent has not heard the neighbour", lambda mode: mode == "bridge")
        return Correspondent(made.fd, mac)

    def links(self) -> dict[str, float]:
        """How many links the agent watches, by their state."""
        return {labels["state"]: value for labels, value in self.metric("vmtap_handover_links")}

    def arrivals(self) -> float:
        """How often the agent has heard a guest for the first time, or again after a wait."""
        metric = self.metric("vmtap_handover_changes_total")
        return sum(value for labels, value in metric if labels["state"] == "here")

    def changes(self) -> float:
        """How often the agent has changed the state of a link since it was started."""
        return sum(value for _, value in self.metric("vmtap_handover_changes_total"))

    def silences(self) -> dict[str, float]:
        """How many VMs have left and arrived, as far as the agent knows how long they were silent."""
        counts = self.metric("vmtap_handover_silence_seconds_count")
        return {"left": 0.0, "arrived": 0.0} | {labels["vm"]: value for labels, value in counts}

    def metric(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Each sample of a metric of the agent's: labels and value."""
        families = text_string_to_metric_families(self.agent.get("/metrics")[2])
        samples = [sample for family in families for sample in family.samples]
        return [(sample.labels, sample.value) for sample in samples if sample.name == name]

    def kept(self) -> list[str]:
        """The marks of VMs that run elsewhere, and what else is left of attachments in the state folder."""
        return [*map(str, (self.agent.run / "elsewhere").glob("*")), *self.agent.shim().leftovers()]


@dataclass
class Bed:
    """Nodes a and b and the wire between them."""

    lab: Lab
    stack: ExitStack
    folder: Path
    macs: list[str] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    """Of each network config."""

    def __post_init__(self) -> None:
        self.a = self._node("a", self.lab.node)
        other = self.stack.enter_context(Netns("node-b", ipv6=False))
        self.lab.switch.plug("node-b", other, NIC, 1500)
        self.lab.switch.wait_until_up("node-b")
        other.wait_until_up(NIC)
        self.b = self._node("b", other)
        port = self.stack.enter_context(packet_socket(self.lab.peer, "eth0"))
        self.machine = Correspondent(port, self.lab.peer.links()["eth0"]["address"])
        self.wire = port

    def _node(self, name: str, where: Netns) -> Node:
        flags = ("--metrics", "127.0.0.1:0", "--reconcile-seconds", "1")
        agent = Agent(where, self.folder / name, self.folder / "interfaces.yaml", flags=flags)
        self.stack.callback(lambda: agent.process and agent.end())
        return Node(self, where, agent.start())

    def guest(self, attached: Attached, *frames: bytes) -> Guest:
        """A guest that runs on the attachment until the end of the test, or until it is stopped."""
        made = Guest(attached.fd).start(*frames)
        self.stack.callback(made.stop)
        return made


@pytest.fixture
def bed(lab: Lab, tmp_path: Path) -> Iterator[Bed]:
    with ExitStack() as stack:
        yield Bed(lab, stack, tmp_path)


def around(bed: Bed) -> list[Correspondent]:
    """Beside the source, beside the target, and on the wire."""
    return [bed.a.neighbour(), bed.b.neighbour(), bed.machine]


def runs_on(node: Node, mac: str = VM) -> tuple[Attached, Guest]:
    """A VM that has been started on the node, and that the agent has heard."""
    made = node.attach(mac)
    assert made.record.handover
    before = node.arrivals()
    running = node.bed.guest(made)

    def speaks() -> float:
        running.send(rarp(mac))
        if made.mode == "bridge" and node.arrivals() == before:  # a late agent has presumed it: begin again
            node.bed.wire.send(arp(mac))
        return node.arrivals()

    until(speaks, "the agent has not heard the guest", lambda now: now > before)
    return made, running


def copied_to(node: Node, running: Guest, mac: str = VM) -> Attached:
    """The link of the target's pod, whose agent has heard that the VM runs elsewhere."""
    target = node.attach(mac)

    def heard() -> tuple[bool, str]:
        running.send(arp(mac))
        return target.elsewhere, target.mode

    until(heard, "the agent has not heard the VM on the wire", lambda seen: seen == (True, "vepa"))
    return target


def switched_over(source: Attached, running: Guest, target: Attached, mac: str = VM) -> Guest:
    """The VM stops on the source, goes on on the target, and is announced, several times as QEMU does it."""
    running.stop()
    arrived = target.node.bed.guest(target)

    def modes() -> tuple[str, str]:
        arrived.send(rarp(mac))
        return source.mode, target.mode

    until(modes, "the links do not follow the VM", lambda seen: seen == ("vepa", "bridge"))
    return arrived


def none_lost(everybody: Sequence[Correspondent], *macs: str, frames: int = 5) -> None:
    """Nobody loses a frame to any of the VMs."""
    for mac in macs or (VM,):
        assert [each.lost(mac, frames) for each in everybody] == [0] * len(everybody)
