"""The reference plugin dhcp as ipam, with its daemon, and a server on the wire."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from lab.process import Closing
from lab.wire import NIC
from tests.runner import config
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.wire import Lab, Netns
    from tests.runner import Plugin

DISCOVER, OFFER, REQUEST, ACK, RELEASE = 1, 2, 3, 5, 7
_COOKIE = b"\x63\x82\x53\x63"
_ETH_P_IP = 0x0800
_TYPE, _OPTIONS = 53, 240


class Server(Closing):
    """A DHCP server (RFC 2131) on the peer with one address to lease. seen: the type and the MAC of each message.

    It reads frames, as DHCP servers do: the kernel drops a client's unicast messages from 0.0.0.0.
    """

    def __init__(self, peer: Netns) -> None:
        self.seen: list[tuple[int, str]] = []
        self._frames, self._answers, self._stop = peer.call(self._open)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @staticmethod
    def _open() -> tuple[socket.socket, socket.socket, socket.socket]:
        frames = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_IP))
        answers = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        answers.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        answers.bind(("", 67))
        return frames, answers, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def _serve(self) -> None:
        while True:
            packet, (*_, direction, _, _) = self._frames.recvfrom(2048)
            if direction == socket.PACKET_OUTGOING or packet[9] != socket.IPPROTO_UDP:
                continue
            if packet[22:24] == b"\0\x43":
                self._answer(packet[28:])
            elif packet[28:] == b"end":
                return

    def _answer(self, message: bytes) -> None:
        kind = _type(message)
        self.seen.append((kind, message[28:34].hex(":")))
        if answer := {DISCOVER: OFFER, REQUEST: ACK}.get(kind):
            self._answers.sendto(_reply(message, answer), ("255.255.255.255", 68))

    def close(self) -> None:
        """End the thread and close the sockets."""
        self._stop.sendto(b"end", ("127.0.0.1", 9))
        self._thread.join()
        for each in (self._frames, self._answers, self._stop):
            each.close()


def _type(message: bytes) -> int:
    at = _OPTIONS
    while message[at] != _TYPE:
        at += 2 + message[at + 1]
    return message[at + 2]


def _reply(request: bytes, kind: int) -> bytes:
    """BOOTP's fields of the request with op 2 (BOOTREPLY), yiaddr, and the options of the lease."""
    server = socket.inet_aton("10.77.0.254")
    head = b"\2" + request[1:16] + socket.inet_aton("10.77.0.9") + server + request[24:236]
    values = {
        _TYPE: bytes([kind]),
        54: server,
        51: struct.pack("!I", 3600),
        1: socket.inet_aton("255.255.255.0"),
        3: server,
    }
    options = b"".join(bytes([code, len(value)]) + value for code, value in values.items())
    return head + _COOKIE + options + b"\xff"


@pytest.fixture
def ipam(lab: Lab, reference_plugins: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The ipam of a network config; the plugin's daemon runs."""
    path = tmp_path / "dhcp.sock"
    argv = lab.node.argv([reference_plugins / "dhcp", "daemon", "-socketpath", path])
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as daemon:
        try:
            until(path.exists, "the daemon makes no socket")
            yield {"type": "dhcp", "daemonSocketPath": str(path)}
        finally:
            daemon.terminate()
            daemon.wait(LIMIT)


@pytest.fixture
def leasing(plugin: Plugin, reference_plugins: Path) -> Plugin:
    return replace(plugin, cni_path=str(reference_plugins))


def test_with_the_address_on_the_link(lab: Lab, leasing: Plugin, ipam: dict[str, Any]) -> None:
    """The link is there before the plugin runs, and until it has released the lease."""
    conf = config(source=NIC, addressing="link", ipam=ipam)
    pod = lab.pod()
    lab.peer.ip("route add default dev eth0")
    with Server(lab.peer) as server:
        result = leasing("ADD", conf, netns=pod).ok()
        mac = result["interfaces"][0]["mac"]
        assert [ip["address"] for ip in result["ips"]] == ["10.77.0.9/24"]
        assert "10.77.0.9/24" in pod.run(["ip", "-br", "address", "show", "net1"]).stdout
        assert "default via 10.77.0.254" in pod.run(["ip", "route", "show", "dev", "net1"]).stdout
        leasing("CHECK", conf | {"prevResult": result}, netns=pod).ok()
        assert server.seen == [(DISCOVER, mac), (REQUEST, mac)]
        leasing("DEL", conf, netns=pod).ok()
        until(lambda: server.seen, "no lease is released", lambda seen: seen[-1] == (RELEASE, mac))
    assert (list(pod.links()), leasing.leftovers()) == (["lo"], [])


def test_without_its_daemon(lab: Lab, leasing: Plugin, tmp_path: Path) -> None:
    """The error is the plugin's, and the link is removed."""
    ipam = {"type": "dhcp", "daemonSocketPath": str(tmp_path / "nobody.sock")}
    pod = lab.pod()
    refused = leasing("ADD", config(source=NIC, addressing="link", ipam=ipam), netns=pod)
    assert refused.status == 1
    assert "ipam.type 'dhcp': error dialing DHCP daemon" in refused.document["msg"]
    assert list(pod.links()) == ["lo"]


def test_for_a_guest(lab: Lab, leasing: Plugin) -> None:
    """Refused before anything is made; DEL needs no daemon."""
    conf = config(source=NIC, ipam={"type": "dhcp"})
    pod = lab.pod()
    msg = leasing("ADD", conf, netns=pod).error(7)["msg"]
    assert "the guest sends its own DHCP requests" in msg
    leasing("DEL", conf, netns=pod).ok()
    assert leasing.leftovers() == []
