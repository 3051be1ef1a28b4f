"""A tap on a Linux bridge: the bridge stays what it was, and offloads cross the redirect whole."""

from __future__ import annotations

import os
import select
import socket
import struct
from fcntl import ioctl
from typing import TYPE_CHECKING

import pytest

from lab.frames import mac_bytes
from lab.wire import BRIDGE, BRIDGE_UPLINK
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab
    from tests.netns.conftest import Attached
    from tests.runner import Plugin

TUNSETOFFLOAD = 0x400454D0
TUN_F_CSUM = 1
TUN_F_TSO4 = 2
NEEDS_CSUM = 1
GSO_TCPV4 = 1
MSS = 1400
ETHERNET, IPV4, TCP = 14, 20, 20


def test_the_bridge_keeps_its_mac(lab: Lab, plugin: Plugin, attach: Callable[..., Attached]) -> None:
    # A high one, as a kernel makes up for one link in 64: what is below it would become the bridge's.
    lab.node.ip(f"link set {BRIDGE_UPLINK} address fe:fe:ff:ff:ff:ff")
    before = lab.node.links()[BRIDGE]["address"]
    assert before == "fe:fe:ff:ff:ff:ff"
    pods = [lab.pod(), lab.pod()]
    for at, pod in enumerate(pods):
        attach(pod, source=BRIDGE, container=f"c{at}")
        assert lab.node.links()[BRIDGE]["address"] == before
    for at, pod in enumerate(pods):
        plugin("DEL", config(source=BRIDGE), netns=pod, container=f"c{at}").ok()
    assert lab.node.links()[BRIDGE]["address"] == before


@pytest.mark.parametrize(("mode", "isolated"), [("bridge", False), ("pepa", True), ("private", True)])
def test_the_port(lab: Lab, attach: Callable[..., Attached], mode: str, isolated: bool) -> None:
    made = attach(lab.pod(), source=BRIDGE, device="tap", mode=mode)
    port = lab.node.links()[f"vth{made.record.ifindex:08x}"]
    assert port["master"] == BRIDGE
    assert port["linkinfo"]["info_slave_data"]["isolated"] is isolated
    assert port["ifalias"] == made.record.alias


def test_a_gso_frame_crosses_whole(lab: Lab, attach: Callable[..., Attached]) -> None:
    """One TCP super-frame with a partial checksum goes in, and the same comes out: nobody cut or summed it."""
    a = attach(lab.pod("a"), container="a", source=BRIDGE)
    b = attach(lab.pod("b"), container="b", source=BRIDGE)
    for guest in (a, b):
        ioctl(guest.fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    frame = tcp_frame(a.record.mac, b.record.mac, payload=bytes(range(256)) * 40)
    header = struct.pack("=BBHHHH", NEEDS_CSUM, GSO_TCPV4, ETHERNET + IPV4 + TCP, MSS, ETHERNET + IPV4, 16)
    os.write(a.fd, header + frame)
    poll = select.poll()
    poll.register(b.fd, select.POLLIN)
    assert poll.poll(30_000), "nothing arrived"
    got = os.read(b.fd, 1 << 17)
    flags, gso, _, size, start, offset = struct.unpack_from("=BBHHHH", got)
    assert (flags & NEEDS_CSUM, gso, size, start, offset) == (1, GSO_TCPV4, MSS, ETHERNET + IPV4, 16)
    assert got[10:] == frame
    assert not poll.poll(100), "a second frame came"


def tcp_frame(source: str, target: str, payload: bytes) -> bytes:
    """Ethernet, IPv4 with its checksum, TCP with the sum of the pseudo-header only, as a guest leaves it."""
    addresses = socket.inet_aton("10.5.0.1") + socket.inet_aton("10.5.0.2")
    length = TCP + len(payload)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, IPV4 + length, 1, 0x4000, 64, socket.IPPROTO_TCP, 0) + addresses
    ip = ip[:10] + struct.pack("!H", ~folded(ip) & 0xFFFF) + ip[12:]
    pseudo = folded(addresses + struct.pack("!HH", socket.IPPROTO_TCP, length))
    tcp = struct.pack("!HHIIBBHHH", 1000, 2000, 1, 1, 5 << 4, 0x10, 0xFFFF, pseudo, 0)
    return mac_bytes(target) + mac_bytes(source) + struct.pack("!H", 0x0800) + ip + tcp + payload


def folded(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
