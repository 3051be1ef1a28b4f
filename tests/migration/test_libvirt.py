"""A real QEMU moves between two nodes with agents. Three correspondents ping it all the while, and count lost pings."""

from __future__ import annotations

import os
import select
import shutil
import socket
import struct
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from lab.frames import VNET_HEADER, mac_bytes, packet_socket
from lab.libvirt import Daemon, Domain, Nic
from tests.kubevirt.conftest import DEPLOY, LauncherPod, image  # noqa: F401 - a fixture
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from lab.guest import Image
    from tests.migration.conftest import Bed

pytestmark = pytest.mark.vm

ADDRESS = "10.77.0.5"
_INTERVAL = 0.02
_AT_LEAST = 10
"""Pings before and after the move."""
_ETH_P_ALL = 0x0003


class Pinger:
    """Pings the guest from start() to stop(), one number after the other, and notes which are answered."""

    def __init__(self, port: int | socket.socket, mac: str, guest: str, address: str) -> None:
        self._port = port
        self._mac, self._guest = mac_bytes(mac), mac_bytes(guest)
        self._address = socket.inet_aton(address)
        self.sent = 0
        self.answered: set[int] = set()
        self._stopping, self._stopped = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._send, self._listen)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[int]:
        """The numbers of the lost pings: those without an answer when the last one has got its."""
        self._stopping.set()
        self._threads[0].join(LIMIT)
        until(lambda: self.sent in self.answered, "the last ping is not answered")
        self._stopped.set()
        self._threads[1].join(LIMIT)
        return sorted(set(range(1, self.sent + 1)) - self.answered)

    def more(self, pings: int) -> None:
        """Returns when so many more are answered."""
        wanted = len(self.answered) + pings
        until(lambda: len(self.answered), "the pings are not answered", lambda count: count >= wanted)

    def _send(self) -> None:
        while not self._stopping.wait(_INTERVAL):
            self._write(self._guest, 0x0800, self._ping(self.sent + 1))
            self.sent += 1

    def _ping(self, number: int) -> bytes:
        icmp = struct.pack("!BBHHH", 8, 0, 0, 7, number)
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(icmp), number, 0, 64, socket.IPPROTO_ICMP, 0)
        ip += self._address + socket.inet_aton(ADDRESS)
        icmp = icmp[:2] + _checksum(icmp) + icmp[4:]
        return ip[:10] + _checksum(ip) + ip[12:] + icmp

    def _write(self, to: bytes, ethertype: int, payload: bytes) -> None:
        frame = (to + self._mac + ethertype.to_bytes(2) + payload).ljust(60, b"\0")
        if isinstance(self._port, int):
            os.write(self._port, bytes(VNET_HEADER) + frame)
        else:
            self._port.send(frame)

    def _listen(self) -> None:
        fd, skip = (self._port, VNET_HEADER) if isinstance(self._port, int) else (self._port.fileno(), 0)
        while not self._stopped.is_set():
            if not select.select([fd], [], [], 0.1)[0]:
                continue
            frame = os.read(fd, 1 << 16)[skip:]
            if frame[6:12] != self._guest:
                continue
            kind, payload = frame[12:14], frame[14:]
            if kind == b"\x08\x06" and payload[6:8] == b"\0\1" and payload[24:28] == self._address:
                reply = payload[:6] + b"\0\2" + self._mac + self._address + payload[8:18]
                self._write(self._guest, 0x0806, reply)
            elif kind == b"\x08\0" and payload[9] == socket.IPPROTO_ICMP and payload[20] == 0:
                self.answered.add(int.from_bytes(payload[26:28]))


def _checksum(data: bytes) -> bytes:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2)


def test_a_live_migration(bed: Bed, image: Image) -> None:  # noqa: F811
    """Each correspondent loses what is in flight at the switch-over: pings in a row, and none before or after."""
    shutil.copyfile(DEPLOY / "examples/interfaces.yaml", bed.a.agent.policy)
    source = LauncherPod(bed.a.agent.shim(), bed.lab.pod("source"), suffix="x7k2p")
    target = LauncherPod(bed.b.agent.shim(), bed.lab.pod("target"), suffix="9qwz4")
    device = {"source": "eth1", "mode": "bridge"}
    mac = source.add("red", deviceID="dataplaneMvp3")["interfaces"][0]["mac"]
    beside = [node.neighbour(**device) for node in (bed.a, bed.b)]
    with (
        packet_socket(bed.lab.peer, "eth0", _ETH_P_ALL) as wire,
        Daemon(source.netns, [source.node("red")]) as here,
        ExitStack() as stack,
    ):
        guest = Domain(here, image, [Nic("red", f"{ADDRESS}/24")])
        guest.ready()
        ports = [(each.port, each.mac) for each in beside]
        ports.append((wire, bed.lab.peer.links()["eth0"]["address"]))
        pingers = [Pinger(*port, mac, f"10.77.0.{at}") for at, port in enumerate(ports, 101)]
        for each in pingers:
            each.start()
        answered_by(pingers)
        target.add("red", deviceID="dataplaneMvp41")
        there = stack.enter_context(Daemon(target.netns, [target.node("red")]))
        stack.callback(guest.close)  # before the daemon that it is moved to
        answered_by(pingers)
        until(
            lambda: any((bed.b.agent.run / "elsewhere").glob("*")) and mode(target),
            "the target's agent has not heard that the VM runs elsewhere",
            lambda seen: seen == "vepa",
        )
        assert mode(source) == "bridge"
        before = [each.sent for each in pingers]
        guest.migrate(there)
        until(
            lambda: (mode(source), mode(target)), "no agent follows", lambda seen: seen == ("vepa", "bridge")
        )
        after = [each.sent for each in pingers]
        answered_by(pingers)
        source.request("DEL", "red").ok()
        answered_by(pingers)
        lost = [each.stop() for each in pingers]
        print("pings sent while it moved, and those lost:", before, after, lost)
        for numbers, first, last in zip(lost, before, after, strict=True):
            assert all(first < number <= last for number in numbers), "lost before or after the move"
            assert numbers == list(range(numbers[0], numbers[-1] + 1) if numbers else []), "not in a row"


def answered_by(pingers: list[Pinger]) -> None:
    """Returns when each has got some more answers."""
    for each in pingers:
        each.more(_AT_LEAST)


def mode(pod: LauncherPod) -> str:
    """The mode that the pod's link has now."""
    found: str = pod.link("red")["linkinfo"]["info_data"]["mode"]
    return found
