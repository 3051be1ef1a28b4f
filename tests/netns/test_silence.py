"""The pod's own kernel is not on the guest's wire: it neither speaks there nor listens.

While a VM boots, or during a live migration, nobody has the device open and frames go up the pod's own stack.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from lab.frames import BROADCAST, collect, mac_bytes, packet_socket
from lab.wire import BRIDGE, NIC
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab, Netns
    from tests.netns.conftest import Attached

SILENCE = 2.5
"""Seconds; a link that comes up says its first IPv6 word in less than one."""
PEER_MAC = "02:00:00:00:00:fe"
ETH_P_ALL = 0x0003
ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD
ALL_NODES = "33:33:00:00:00:01"


@pytest.mark.parametrize("source", [NIC, BRIDGE])
def test_no_frame_with_the_guests_mac(lab: Lab, attach: Callable[..., Attached], source: str) -> None:
    pod = lab.pod()
    control = lab.pod("control")
    with packet_socket(lab.peer, "eth0", ETH_P_ALL) as wire:
        mac = attach(pod, source=source, opened=False).record.mac
        # What it would be like: a link beside it that nobody silenced.
        lab.node.ip(f"link add link {NIC} name loud netns {control.path} type macvtap mode bridge")
        control.ip("link set loud up")
        loud = control.links()["loud"]["address"]
        heard: set[str] = set()

        def listen() -> set[str]:
            heard.update(frame.src for frame in collect({"wire": wire}, timeout=SILENCE)["wire"])
            return set(heard)

        until(listen, "the control link never spoke", lambda sources: loud in sources)
    assert mac not in heard


@pytest.mark.parametrize("source", [NIC, BRIDGE])
def test_a_router_on_the_wire_is_not_believed(lab: Lab, attach: Callable[..., Attached], source: str) -> None:
    attached = attach(lab.pod(), source=source, opened=False)
    control = lab.pod("control")
    lab.node.ip(f"link add link {NIC} name loud netns {control.path} type macvtap mode bridge")
    control.ip("link set loud up")
    with packet_socket(lab.peer, "eth0", ETH_P_IPV6) as wire:

        def advertise() -> str:
            wire.send(router_advertisement())
            return addresses(control, 6)

        until(advertise, "the control pod never believed the router", lambda seen: "2001:db8:" in seen)
    assert addresses(attached.pod, 6) == ""
    assert attached.pod.run(["ip", "-6", "route", "show", "default"]).stdout == ""


@pytest.mark.parametrize("source", [NIC, BRIDGE])
def test_arp_for_another_address_of_the_pod(lab: Lab, attach: Callable[..., Attached], source: str) -> None:
    attached = attach(lab.pod(), source=source, opened=False)
    control = lab.pod("control")
    lab.node.ip(f"link add link {NIC} name loud netns {control.path} type macvtap mode bridge")
    control.ip("link set loud addrgenmode none", "link set loud up", "address add 10.9.9.8/32 dev lo")
    # The pod's address on another interface, as its primary network has it.
    attached.pod.ip("address add 10.9.9.9/32 dev lo")
    with packet_socket(lab.peer, "eth0", ETH_P_ARP) as wire:
        for address in ("10.9.9.9", "10.9.9.8"):  # the second is the marker: it is answered
            wire.send(arp_request(address))
        loud = control.links()["loud"]["address"]
        answers: list[str] = []

        def listen() -> list[str]:
            answers.extend(frame.src for frame in collect({"wire": wire}, timeout=0.1)["wire"])
            return list(answers)

        until(listen, "the control pod did not answer", lambda sources: loud in sources)
        answers += [frame.src for frame in collect({"wire": wire}, timeout=0.2)["wire"]]
    assert attached.record.mac not in answers


def addresses(pod: Netns, version: int) -> str:
    return pod.run(["ip", f"-{version}", "address", "show", "scope", "global"]).stdout


def arp_request(address: str) -> bytes:
    """Who has address? (RFC 826)"""
    ethernet = mac_bytes(BROADCAST) + mac_bytes(PEER_MAC) + struct.pack("!H", ETH_P_ARP)
    kinds = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    sender = mac_bytes(PEER_MAC) + socket.inet_aton("10.77.0.254")
    return (ethernet + kinds + sender + bytes(6) + socket.inet_aton(address)).ljust(60, b"\0")


def router_advertisement() -> bytes:
    """I am a default router, and 2001:db8::/64 is for autoconfiguration (RFC 4861 sections 4.2, 4.6.2)."""
    source = socket.inet_pton(socket.AF_INET6, "fe80::fe")
    target = socket.inet_pton(socket.AF_INET6, "ff02::1")
    prefix = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0)
    prefix += socket.inet_pton(socket.AF_INET6, "2001:db8::")
    body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix
    pseudo = source + target + struct.pack("!I3xB", len(body), socket.IPPROTO_ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    packet = struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255) + source + target + body
    return mac_bytes(ALL_NODES) + mac_bytes(PEER_MAC) + struct.pack("!H", ETH_P_IPV6) + packet


def checksum(data: bytes) -> int:
    """The internet's (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
