"""What a port refuses of the frames that a guest sends and receives, on the real kernel (cni/port/filter.py)."""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cni.kernel import nft
from cni.port import filter as filter_
from cni.port import guard
from cni.state.port_profile import Port
from lab.frames import BROADCAST, VNET_HEADER, mac_bytes, packet_socket
from lab.wire import BRIDGE, NIC
from tests.runner import config
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab, Netns
    from tests.netns.conftest import Attached
    from tests.runner import Plugin

FOREIGN, SPOOFED = "02:00:00:00:00:78", "02:00:00:00:00:79"
VIRTUAL, MULTICAST = "00:00:5e:00:01:07", "33:33:00:00:00:01"
OWN4, OWN6, OTHER4, OTHER6 = "10.1.0.5", "fd00::5", "10.1.0.6", "fd00::6"
ADDRESSES = (f"{OWN4}/24", f"{OWN6}/64")
ALL_PROTOCOLS = 3
_NAME = 64
"""Bytes behind each frame, with its name. They are part of the IP packet: a bridge may cut off the rest."""


def ethernet(
    payload: bytes, *, src: str, dst: str = FOREIGN, tags: tuple[tuple[int, int], ...] = ()
) -> bytes:
    """payload begins with its ethertype; tags: (ethertype, VLAN id) of each tag."""
    inner = b"".join(kind.to_bytes(2) + vlan.to_bytes(2) for kind, vlan in tags)
    return mac_bytes(dst) + mac_bytes(src) + inner + payload


def ipv4(
    src: str, proto: int, body: bytes, *, dst: str = "10.1.0.9", options: bytes = b"", fragment: int = 0
) -> bytes:
    head = (
        bytes([0x45 + len(options) // 4, 0]) + (20 + len(options) + len(body) + _NAME).to_bytes(2) + bytes(2)
    )
    head += fragment.to_bytes(2) + bytes([64, proto])
    rest = ipaddress.ip_address(src).packed + ipaddress.ip_address(dst).packed + options
    total = sum(int.from_bytes((head + rest)[at : at + 2]) for at in range(0, len(head + rest), 2))
    checksum = ~(total % 0xFFFF) & 0xFFFF  # a bridge drops multicast without it
    return b"\x08\x00" + head + checksum.to_bytes(2) + rest + body


def ipv6(src: str, header: int, body: bytes) -> bytes:
    head = b"\x60\0\0\0" + (len(body) + _NAME).to_bytes(2) + bytes([header, 255])
    return (
        b"\x86\xdd" + head + ipaddress.ip_address(src).packed + ipaddress.ip_address("ff02::1").packed + body
    )


def udp(src: int, dst: int) -> bytes:
    return src.to_bytes(2) + dst.to_bytes(2) + bytes(4)


def icmpv6(kind: int, target: str = "::") -> bytes:
    return bytes([kind]) + bytes(7) + ipaddress.ip_address(target).packed


def arp(
    mac: str, address: str, kind: int = 2, *, target: str = "10.1.0.9", lengths: bytes = b"\6\4"
) -> bytes:
    who = mac_bytes(mac) + ipaddress.ip_address(address).packed
    whom = bytes(6) + ipaddress.ip_address(target).packed
    return b"\x08\x06\0\x01\x08\0" + lengths + kind.to_bytes(2) + who + whom


def rarp(mac: str, address: str = "0.0.0.0", kind: int = 3) -> bytes:  # noqa: S104
    """With its defaults, what QEMU announces a guest with (net/announce.c)."""
    return b"\x80\x35" + arp(mac, address, kind)[2:]


def snap(packet: bytes, organisation: bytes = bytes(3)) -> bytes:
    """The packet, which begins with its ethertype, in IEEE 802.3 with LLC and SNAP."""
    body = b"\xaa\xaa\x03" + organisation + packet
    return (len(body) + _NAME).to_bytes(2) + body


def local(mac: str) -> str:
    """The link-local address of a MAC, by EUI-64."""
    raw = mac_bytes(mac)
    return str(
        ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2, *raw[1:3], 255, 254, *raw[3:]]))
    )


def put(made: Attached, port: Port) -> None:
    def inside() -> None:
        with nft.opened() as netlink:
            filter_.install(netlink, made.record.ifname, port, made.record.mac, ADDRESSES)

    made.pod.call(inside)


def intact(made: Attached, port: Port) -> bool:
    def inside() -> bool:
        with nft.opened() as netlink:
            return filter_.is_intact(netlink, made.record.ifname, port, made.record.mac, ADDRESSES)

    return made.pod.call(inside)


def refused(made: Attached) -> dict[str, int]:
    def inside() -> dict[str, int]:
        with nft.opened() as netlink:
            return filter_.refused(netlink, made.record.ifname)

    return {reason: count for reason, count in made.pod.call(inside).items() if count}


def arrived(
    there: int | socket.socket, send: Callable[[bytes], object], frames: dict[str, bytes], last: bytes
) -> set[str]:
    """The names of the frames that arrive before the last one, which passes."""
    for name, frame in {**frames, "last": last}.items():
        send(frame + f"<<{name}>>".encode().ljust(_NAME, b"\0"))
    got: set[str] = set()
    until = time.monotonic() + 10
    fd = there if isinstance(there, int) else there.fileno()
    while "last" not in got:
        assert select.select([fd], [], [], max(0, until - time.monotonic()))[0], (
            f"the last one did not arrive: {got}"
        )
        _, _, rest = os.read(fd, 1 << 16).rpartition(b"<<")
        got.add(rest.partition(b">>")[0].decode(errors="replace"))  # others' frames have no name
    return got & frames.keys()


def sent(lab: Lab, made: Attached, frames: dict[str, bytes]) -> set[str]:
    """Those of the frames that reach the wire when the guest sends them."""
    last = ethernet(b"\x88\xb5", src=made.record.mac)
    with packet_socket(lab.peer, "eth0", ALL_PROTOCOLS) as peer:
        return arrived(peer, lambda each: os.write(made.fd, bytes(VNET_HEADER) + each), frames, last)


def received(lab: Lab, made: Attached, frames: dict[str, bytes]) -> set[str]:
    """Those of the frames that reach the guest when the peer sends them."""
    last = ethernet(b"\x88\xb5", src=FOREIGN, dst=made.record.mac)
    with packet_socket(lab.peer, "eth0", ALL_PROTOCOLS) as peer:
        return arrived(made.fd, peer.send, frames, last)


@pytest.fixture
def made(lab: Lab, attach: Callable[..., Attached]) -> Attached:
    lab.node.ip(f"link set {NIC} promisc on")
    return attach(lab.pod(), source=NIC, mode="bridge")


def test_macs(lab: Lab, made: Attached) -> None:
    own = made.record.mac
    frames = {
        "own": ethernet(b"\x88\xb5", src=own),
        "foreign": ethernet(b"\x88\xb5", src=SPOOFED),
        "broadcast": ethernet(b"\x88\xb5", src=own, dst=BROADCAST),
        "VRRP": ethernet(ipv4(OWN4, 112, bytes(20), dst="224.0.0.18"), src=VIRTUAL, dst="01:00:5e:00:00:12"),
        "tagged": ethernet(b"\x88\xb5", src=own, tags=((0x8100, 7),)),
    }
    assert sent(lab, made, frames) == frames.keys(), "without a profile all pass"
    put(made, Port(mac_spoof_check=True))
    assert sent(lab, made, frames) == {"own", "broadcast", "tagged"}
    assert refused(made) == {"source-mac": 2}
    put(made, Port(mac_spoof_check=True, macs=(VIRTUAL,)))
    assert sent(lab, made, frames) == frames.keys() - {"foreign"}
    assert refused(made) == {"source-mac": 1}, "the profile was exchanged as a whole"


def test_frames_for_others_do_not_reach_a_guest_that_has_changed_its_mac(lab: Lab, made: Attached) -> None:
    put(made, Port(mac_spoof_check=True))
    frames = {
        "foreign": ethernet(b"\x88\xb5", src=VIRTUAL, dst=FOREIGN),
        "broadcast": ethernet(b"\x88\xb5", src=VIRTUAL, dst=BROADCAST),
        "multicast": ethernet(b"\x88\xb5", src=VIRTUAL, dst=MULTICAST),
    }
    made.pod.ip(f"link set net1 address {FOREIGN}")
    with packet_socket(lab.peer, "eth0", ALL_PROTOCOLS) as peer:
        last = ethernet(b"\x88\xb5", src=VIRTUAL, dst=BROADCAST)
        assert arrived(made.fd, peer.send, frames, last) == frames.keys() - {"foreign"}
    assert refused(made) == {"other-mac": 1}


@pytest.mark.parametrize(
    ("trunk", "passing"),
    [
        (None, {"100", "205", "300", "priority", "service", "two", "none"}),
        ((), {"none"}),
        (("100", "200-210"), {"100", "205", "none"}),
        (("0",), {"priority", "none"}),
    ],
)
def test_tags(lab: Lab, made: Attached, trunk: tuple[str, ...] | None, passing: set[str]) -> None:
    tags = {
        "100": ((0x8100, 100),),
        "205": ((0x8100, 205),),
        "300": ((0x8100, 300),),
        "priority": ((0x8100, 0),),
        "service": ((0x88A8, 100),),
        "two": ((0x8100, 100), (0x8100, 100)),
        "none": (),
    }
    put(made, Port(mac_spoof_check=True, trunk=trunk))
    out = {name: ethernet(b"\x88\xb5", src=made.record.mac, tags=each) for name, each in tags.items()}
    assert sent(lab, made, out) == passing
    into = {
        name: ethernet(b"\x88\xb5", src=FOREIGN, dst=made.record.mac, tags=each)
        for name, each in tags.items()
    }
    assert received(lab, made, into) == passing
    counts = refused(made)
    assert counts.get("tag-sent", 0) == counts.get("tag-received", 0) == len(tags) - len(passing)


@pytest.mark.parametrize("vlan", [None, 100])
def test_addresses(lab: Lab, made: Attached, vlan: int | None) -> None:
    own = made.record.mac
    good = {
        "arp": arp(own, OWN4),
        "arp of the kind 6": arp(own, OWN4)[:3] + b"\x06" + arp(own, OWN4)[4:],
        "arp probe": arp(own, "0.0.0.0", 1, target=OWN4),  # noqa: S104
        "ipv4": ipv4(OWN4, 17, udp(1, 2)),
        "dhcp": ipv4("0.0.0.0", 17, udp(68, 67)),  # noqa: S104
        "ipv6": ipv6(OWN6, 17, udp(1, 2)),
        "link-local": ipv6(local(own), 58, icmpv6(135, OTHER6)),
        "slaac": ipv6(local(own).replace("fe80::", "2001:db8::"), 17, udp(1, 2)),
        "probe": ipv6("::", 58, icmpv6(135, local(own))),
        "report": ipv6("::", 0, bytes([58, 0, 5, 2, 0, 0, 1, 0]) + icmpv6(143)),
        "report of MLDv1": ipv6("::", 0, bytes([58, 0, 5, 2, 0, 0, 1, 0]) + icmpv6(131)),
        "long ping": ipv6(OWN6, 44, bytes([58, 0, 0, 1, 0, 0, 0, 1]) + icmpv6(128)),
        "neighbour": ipv6(OWN6, 58, icmpv6(136, OWN6)),
        "rarp": rarp(own),
        "spanning tree": (38 + _NAME).to_bytes(2) + b"\x42\x42\x03" + bytes(35),
    }
    bad = {
        "arp of another": (arp(own, OTHER4), "arp"),
        "arp for a MAC": (arp(FOREIGN, OWN4), "arp"),
        "arp probe for another": (arp(own, "0.0.0.0", 1, target=OTHER4), "arp"),  # noqa: S104
        "arp of odd lengths": (arp(own, OWN4, lengths=b"\x08\x04"), "arp"),
        "short arp": (arp(own, OTHER4)[:16], "arp"),
        "rarp for a MAC": (rarp(FOREIGN), "rarp"),
        "rarp server": (rarp(own, kind=4), "rarp"),
        "rarp of an address": (rarp(own, OTHER4), "rarp"),
        "dhcp behind options": (
            ipv4("0.0.0.0", 17, udp(1, 2), options=udp(68, 67)[:4]),  # noqa: S104
            "ipv4",
        ),
        "later fragment of dhcp": (ipv4("0.0.0.0", 17, udp(68, 67), fragment=1), "ipv4"),  # noqa: S104
        "probe of another": (ipv6("::", 58, icmpv6(135, OTHER6)), "ipv6"),
        "arp in SNAP": (snap(arp(own, OTHER4)), "hidden"),
        "ipv4 in SNAP": (snap(ipv4(OTHER4, 17, udp(1, 2))), "hidden"),
        "arp in SNAP of bridges": (snap(arp(own, OTHER4), b"\0\0\xf8"), "hidden"),
        "ipv4 in LLC": ((64 + _NAME).to_bytes(2) + b"\x06\x06\x03" + bytes(61), "hidden"),
        "fragmented neighbour": (
            ipv6(OWN6, 44, bytes([58, 0, 0, 1, 0, 0, 0, 1]) + icmpv6(136, OTHER6)),
            "hidden",
        ),
        "ipv4 of another": (ipv4(OTHER4, 17, udp(1, 2)), "ipv4"),
        "from nowhere": (ipv4("0.0.0.0", 17, udp(69, 67)), "ipv4"),  # noqa: S104
        "ipv6 of another": (ipv6(OTHER6, 17, udp(1, 2)), "ipv6"),
        "link-local of another": (ipv6("fe80::1", 58, icmpv6(135, OTHER6)), "ipv6"),
        "advertised from nowhere": (ipv6("::", 58, icmpv6(136, OWN6)), "ipv6"),
        "neighbour of another": (ipv6(OWN6, 58, icmpv6(136, OTHER6)), "neighbour"),
        "hidden": (ipv6(OWN6, 0, bytes([58, 0, 1, 4, 0, 0, 0, 0]) + icmpv6(136, OTHER6)), "hidden"),
    }
    put(made, Port(ip_spoof_check=True, trunk=("100",) if vlan else None))
    tags = ((0x8100, vlan),) if vlan else ()
    frames = {name: ethernet(each, src=own, tags=tags) for name, each in good.items()}
    frames |= {name: ethernet(each, src=own, tags=tags) for name, (each, _) in bad.items()}
    assert sent(lab, made, frames) == good.keys()
    reasons = [reason for _, reason in bad.values()]
    assert refused(made) == {each: reasons.count(each) for each in reasons}


def test_further_addresses(lab: Lab, made: Attached) -> None:
    """Those of VRRP, with its MAC; and prefixes, for IPv6 addresses that the guest generates, and for a router."""
    own = made.record.mac
    addresses = ("10.1.0.100", "10.9.0.0/16", "2001:db8:1::/64", "fe80::/64")
    vrrp = ipv4(OWN4, 112, bytes(20), dst="224.0.0.18")
    frames = {
        "own": ethernet(arp(own, OWN4), src=own),
        "virtual": ethernet(arp(VIRTUAL, "10.1.0.100", 1, target="10.1.0.100"), src=VIRTUAL, dst=BROADCAST),
        "VRRP": ethernet(vrrp, src=VIRTUAL, dst="01:00:5e:00:00:12"),
        "virtual, version 4": ethernet(ipv4("10.1.0.100", 17, udp(1, 2)), src=VIRTUAL),
        "routed": ethernet(ipv4("10.9.200.1", 17, udp(1, 2)), src=own),
        "stable private": ethernet(ipv6("2001:db8:1::7217:1", 17, udp(1, 2)), src=own),
        "its neighbour": ethernet(ipv6("fe80::1", 58, icmpv6(136, "2001:db8:1::7217:1")), src=own),
        "its probe": ethernet(ipv6("::", 58, icmpv6(135, "fe80::1")), src=own),
    }
    others = {
        "another": ethernet(arp(VIRTUAL, "10.1.0.101"), src=VIRTUAL),
        "another's route": ethernet(ipv4("10.10.0.1", 17, udp(1, 2)), src=own),
        "another prefix": ethernet(ipv6("2001:db8:2::1", 17, udp(1, 2)), src=own),
    }
    put(made, Port(mac_spoof_check=True, ip_spoof_check=True))
    assert sent(lab, made, frames) == {"own"}
    port = Port(mac_spoof_check=True, macs=(VIRTUAL,), ip_spoof_check=True, addresses=addresses)
    put(made, port)
    assert sent(lab, made, frames | others) == frames.keys()
    assert intact(made, port)
    assert refused(made) == {"arp": 1, "ipv4": 1, "ipv6": 1}


def test_servers_and_routers(lab: Lab, made: Attached) -> None:
    own = made.record.mac
    options, fragment = bytes([0, 0, 1, 4, 0, 0, 0, 0]), bytes([0, 0, 0, 0, 0, 0, 0, 1])
    good = {
        "dhcp client": ipv4(OWN4, 17, udp(68, 67)),
        "dhcpv6 client": ipv6(local(own), 17, udp(546, 547)),
        "solicitation": ipv6(local(own), 58, icmpv6(133)),
        "neighbour": ipv6(local(own), 58, icmpv6(136, local(own))),
        "mld": ipv6(local(own), 0, b"\x3a" + options[1:] + icmpv6(143)),
        "later fragment": ipv4(OWN4, 17, udp(67, 68), fragment=0x00B9),
        "ping": ipv4(OWN4, 1, bytes([8, 0]) + bytes(6)),
        "fragments": ipv6(OWN6, 44, bytes([17]) + fragment[1:] + udp(1, 2)),
    }
    bad = {
        "offer": (ipv4(OWN4, 17, udp(67, 68)), "dhcp-server"),
        "offer from another port": (ipv4(OWN4, 17, udp(1067, 68)), "dhcp-server"),
        "dhcpv6 reply from another port": (ipv6(local(own), 17, udp(1547, 546)), "dhcp-server"),
        "dhcpv6 reply from another port, first fragment": (
            ipv6(OWN6, 44, bytes([17]) + fragment[1:] + udp(1547, 546)),
            "hidden",
        ),
        "offer to a relay": (ipv4(OWN4, 17, udp(67, 67)), "dhcp-server"),
        "offer, first fragment": (ipv4(OWN4, 17, udp(67, 68), fragment=0x2000), "dhcp-server"),
        "offer behind options": (ipv4(OWN4, 17, udp(67, 68), options=b"\x94\x04\0\0"), "dhcp-server"),
        "dhcpv6 reply": (ipv6(local(own), 17, udp(547, 546)), "dhcp-server"),
        "dhcpv6 reply, first fragment": (
            ipv6(OWN6, 44, bytes([17]) + fragment[1:] + udp(547, 546)),
            "hidden",
        ),
        "advertisement": (ipv6(local(own), 58, icmpv6(134)), "router"),
        "redirect": (ipv6(local(own), 58, icmpv6(137)), "router"),
        "redirect, version 4": (ipv4(OWN4, 1, bytes([5]) + bytes(7)), "router"),
        "advertisement behind options": (ipv6(local(own), 0, b"\x3a" + options[1:] + icmpv6(134)), "hidden"),
        "behind two options": (
            ipv6(local(own), 0, b"\x3c" + options[1:] + b"\x3a" + options[1:] + icmpv6(134)),
            "hidden",
        ),
        "behind long options": (ipv6(local(own), 0, b"\x3a\x01" + bytes(14) + icmpv6(134)), "hidden"),
        "behind a routing header": (ipv6(local(own), 43, b"\x3a" + bytes(7) + icmpv6(134)), "hidden"),
        "behind destination options": (ipv6(local(own), 60, b"\x3a" + options[1:] + icmpv6(134)), "hidden"),
        "fragmented": (ipv6(local(own), 44, b"\x3a" + fragment[1:] + icmpv6(134)), "hidden"),
    }
    put(made, Port(dhcp_server=False, router_advertisements=False))
    frames = {name: ethernet(each, src=own) for name, each in good.items()}
    frames |= {name: ethernet(each, src=own) for name, (each, _) in bad.items()}
    assert sent(lab, made, frames) == good.keys()
    reasons = [reason for _, reason in bad.values()]
    assert refused(made) == {each: reasons.count(each) for each in reasons}


def test_a_storm(lab: Lab, made: Attached) -> None:
    """The burst is a second's worth; what is for one receiver is not limited."""
    put(made, Port(broadcast=10))
    frames = {f"broadcast {n}": ethernet(b"\x88\xb5", src=made.record.mac, dst=BROADCAST) for n in range(100)}
    frames |= {f"for one {n}": ethernet(b"\x88\xb5", src=made.record.mac) for n in range(100)}
    got = sent(lab, made, frames)
    assert sum(name.startswith("for one") for name in got) == 100
    assert 10 <= sum(name.startswith("broadcast") for name in got) < 100
    assert refused(made)["broadcast"] == 200 - len(got)


def test_what_others_change_is_seen(lab: Lab, made: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    port = Port(
        mac_spoof_check=True,
        macs=(VIRTUAL,),
        ip_spoof_check=True,
        dhcp_server=False,
        router_advertisements=False,
        trunk=("100", "200-210"),
        broadcast=10,
        in_rate=1_000_000_000,
    )
    table = f"netdev {filter_.table('net1')}"
    rules = made.pod.run(["nft", "list", "ruleset"]).stdout
    assert rules == ""
    for change in (
        f"add rule {table} out accept",
        f"insert rule {table} check-ipv4 accept",
        f"flush chain {table} check-source-mac",
        f"add table {table} {{ flags dormant; }}",
        f"delete table {table}",
    ):
        put(made, port)
        sent(lab, made, {"another": ethernet(b"\x88\xb5", src=SPOOFED)})
        assert intact(made, port), "counters do not count"
        assert not intact(made, Port(mac_spoof_check=True))
        made.pod.run(["nft", *change.split()])
        assert not intact(made, port), change
    put(made, port)
    listed = made.pod.run(["nft", "list", "ruleset"]).stdout
    made.pod.run(
        ["nft", "-f", "-"], stdin=f"flush ruleset\n{listed}"
    )  # as a node's firewall may be saved and loaded
    name = filter_.table("net1")
    monkeypatch.setattr(filter_, "table", lambda _: name)
    made.pod.ip("link add other type veth peer name peer0")
    put(replace(made, record=replace(made.record, ifname="other")), port)
    assert not intact(made, port), "they are at another link"
    put(made, port)
    assert intact(made, port)


def tso(src: str, dst: str, size: int) -> bytes:
    """A frame of TCP as a guest passes it to its host to cut up, with its vnet header (linux/virtio_net.h)."""
    tcp = (1).to_bytes(2) + (2).to_bytes(2) + bytes(8) + b"\x50\x10\xff\xff" + bytes(4)
    packet = ipv4(OWN4, 6, tcp + bytes(size - _NAME))
    return struct.pack("=BBHHHH", 1, 1, 54, 1448, 34, 16) + ethernet(packet, src=src, dst=dst) + bytes(_NAME)


@pytest.mark.parametrize("source", [NIC, BRIDGE])
def test_each_queue_and_long_frames(
    lab: Lab, plugin: Plugin, attach: Callable[..., Attached], source: str
) -> None:
    """A frame of 64 KiB passes a slow port: the burst has room for it. What is checked is checked in each queue."""
    peer_mac = lab.peer.links()["eth0"]["address"]
    made = attach(
        lab.pod(),
        source=source,
        queues=2,
        port={"macSpoofCheck": True, "rate": {"out": "10Mbit", "in": "10Mbit"}},
    )
    own = made.record.mac
    with packet_socket(lab.peer, "eth0", ALL_PROTOCOLS) as peer:
        for fd in made.fds:
            os.write(fd, tso(SPOOFED, peer_mac, 1 << 15))
            os.write(fd, bytes(VNET_HEADER) + ethernet(b"\x88\xb5" + bytes(_NAME), src=SPOOFED))
        os.write(made.fds[1], tso(own, peer_mac, 65000))
        length = 0
        while length < 65000:
            assert select.select([peer], [], [], LIMIT)[0], f"{length} bytes of it arrived"
            frame = peer.recv(1 << 17)
            assert frame[6:12] != mac_bytes(SPOOFED)
            if frame[6:12] == mac_bytes(own):
                length += len(frame) - 54
    place = made.pod if source == NIC else lab.node
    assert place.call(lambda: guard.refused(made.record)) == {"source-mac": 4, "other-mac": 0, "rate": 0}


def test_a_checksum_that_rewrites_a_frame(lab: Lab, plugin: Plugin, attach: Callable[..., Attached]) -> None:
    """A guest may have its host write a sum to any place, such as the address of an ARP packet (virtio_net.h).

    On a tap it is in the frame when the filters see it. On a macvtap it is not (docs/port.md).
    """
    port = {"ipSpoofCheck": True, "addresses": [OWN4]}
    made = attach(lab.pod(), source=BRIDGE, port=port)
    own = made.record.mac
    wanted = int.from_bytes(ipaddress.ip_address(OTHER4).packed[2:])
    start, at = 20, 30  # the second half of the sender's address
    frame = ethernet(arp(own, OWN4), src=own).ljust(58, b"\0")
    words = frame[start:]
    total = sum(int.from_bytes(words[each : each + 2]) for each in range(0, len(words), 2))
    frame += ((0xFFFF - wanted - total) % 0xFFFF).to_bytes(2)
    header = struct.pack("=BBHHHH", 1, 0, 0, 0, start, at - start)  # VIRTIO_NET_HDR_F_NEEDS_CSUM
    refused_before = lab.node.call(lambda: guard.refused(made.record))["arp"]
    with packet_socket(lab.peer, "eth0", ALL_PROTOCOLS) as peer:
        os.write(made.fd, header + frame)
        os.write(made.fd, bytes(VNET_HEADER) + ethernet(arp(own, OWN4), src=own).ljust(60, b"\0"))
        seen = peer.recv(1 << 16)
        while seen[6:12] != mac_bytes(own):
            seen = peer.recv(1 << 16)
    assert seen.rstrip(b"\0") == ethernet(arp(own, OWN4), src=own), "the first frame was refused"
    assert lab.node.call(lambda: guard.refused(made.record))["arp"] == refused_before + 1


POLICY = """
interfaces:
- name: dynamic
  source: {{dev: {nic}}}
  port: {{ipSpoofCheck: true, addresses: ["10.77.0.0/24"]}}
- name: data
  source: {{dev: {nic}}}
  port: {{macSpoofCheck: true, trunk: [100], rate: {{out: 100Mbit, in: 1Gbit}}}}
- name: bridged
  source: {{dev: {bridge}}}
  port: {{macSpoofCheck: true, dhcpServer: false, rate: {{out: 100Mbit, in: 1Gbit}}}}
"""


@pytest.fixture
def policed(plugin: Plugin) -> Plugin:
    plugin.policy.write_text(POLICY.format(nic=NIC, bridge=BRIDGE))
    return plugin


def rulesets(lab: Lab, pod: Netns) -> str:
    """The tables of the pod and of the node."""
    return "".join(each.run(["nft", "list", "ruleset"]).stdout for each in (pod, lab.node))


@pytest.mark.parametrize("interface", ["data", "bridged"])
def test_an_attachment_has_it_from_add_to_del(
    lab: Lab, policed: Plugin, attach: Callable[..., Attached], interface: str
) -> None:
    pod = lab.pod()
    made = attach(pod, interface=interface)
    own = made.record.mac
    assert made.record.port
    frames = {
        "own": ethernet(b"\x88\xb5", src=own),
        "foreign": ethernet(b"\x88\xb5", src=SPOOFED),
        "100": ethernet(b"\x88\xb5", src=own, tags=((0x8100, 100),)),
        "101": ethernet(b"\x88\xb5", src=own, tags=((0x8100, 101),)),
        "offer": ethernet(ipv4(OWN4, 17, udp(67, 68)), src=own),
    }
    assert sent(lab, made, frames) == {"data": {"own", "100", "offer"}, "bridged": {"own"}}[interface]
    place, link = (pod, "net1") if interface == "data" else (lab.node, f"vth{made.record.ifindex:08x}")
    shaped = {"data": "100Mbit", "bridged": "1Gbit"}[interface]
    assert f"rate {shaped} burst" in place.run(["tc", "qdisc", "show", "dev", link]).stdout
    conf = config(interface=interface)
    policed("CHECK", {**conf, "prevResult": made.result}, netns=pod).ok()
    place.run(["nft", "delete", "table", "netdev", filter_.table(link)])
    assert "filters" in policed("CHECK", {**conf, "prevResult": made.result}, netns=pod).error(108)["msg"]
    policed("DEL", conf, netns=pod).ok()
    attach(pod, interface=interface, opened=False)
    assert filter_.table(link) in rulesets(lab, pod) or interface == "bridged"
    policed("DEL", conf, netns=pod).ok()
    assert rulesets(lab, pod) == ""
    assert pod.links().keys() == {"lo"}


@pytest.mark.parametrize(
    ("port", "code", "why"),
    [
        ({"macSpoofCheck": False}, 7, "port.macSpoofCheck: false is refused: the policy has true"),
        ({"trunk": [100, 101]}, 7, 'port.trunk: "101" is refused: the policy allows 100'),
        ({"trunk": ["100-4094"]}, 7, "port.trunk"),
        ({"ipSpoofCheck": True}, 7, "give ipam"),
        (
            {"macs": ["02:00:00:00:00:09"]},
            7,
            'port.macs: "02:00:00:00:00:09" is refused: the policy allows none',
        ),
    ],
)
def test_a_network_config_only_narrows(lab: Lab, policed: Plugin, port: object, code: int, why: str) -> None:
    assert why in policed("ADD", config(interface="data", port=port), netns=lab.pod()).error(code)["msg"]


@pytest.mark.parametrize("interface", ["data", "bridged"])
@pytest.mark.parametrize("burst", ["64KiB", "256MiB", None])
@pytest.mark.parametrize("rate", ["1kbit", "100Gbit"])
def test_the_kernel_takes_each_rate(
    *, lab: Lab, plugin: Plugin, attach: Callable[..., Attached], interface: str, rate: str, burst: str | None
) -> None:
    entries = "- {{name: data, source: {{dev: {}}}}}\n- {{name: bridged, source: {{dev: {}}}}}\n"
    plugin.policy.write_text(f"interfaces:\n{entries.format(NIC, BRIDGE)}")
    made = attach(lab.pod(), interface=interface, port={"rate": {"out": rate, "in": rate, "burst": burst}})
    frames = {"one": ethernet(b"\x88\xb5", src=made.record.mac)}
    assert sent(lab, made, frames) == {"one"}


def test_addresses_without_ipam(lab: Lab, policed: Plugin, attach: Callable[..., Attached]) -> None:
    made = attach(lab.pod(), interface="dynamic", opened=False)
    assert made.record.port
    assert made.record.port.addresses == ("10.77.0.0/24",)
    policed.policy.write_text(policed.policy.read_text().replace("10.77.0.0/24", "10.77.0.0/33"))
    error = policed("ADD", config(interface="dynamic"), netns=lab.pod()).error(7)
    assert 'port.addresses: "10.77.0.0/33" is refused: it is no IPv4 or IPv6 address' in error["msg"]


def test_the_smallest_rate_counts(lab: Lab, policed: Plugin, attach: Callable[..., Attached]) -> None:
    port = {"trunk": [], "rate": {"out": "10Gbit", "in": "10Mbit", "burst": "128KiB"}}
    bandwidth = {"egressRate": 50_000_000, "egressBurst": 1_000_000, "ingressRate": 0}
    made = attach(
        lab.pod(), interface="data", opened=False, port=port,
        runtimeConfig={"bandwidth": bandwidth}, capabilities={"bandwidth": True},
    )  # fmt: skip
    found = made.record.port
    assert found
    assert (found.out_rate, found.out_burst) == (50_000_000, 125_000)
    assert (found.in_rate, found.in_burst, found.trunk) == (10_000_000, 128 << 10, ())
