"""A guest with a kernel of its own, behind a port: what it may do works, and what it may not reaches nobody."""

from __future__ import annotations

import base64
import ipaddress
import os
import select
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni.port import guard
from lab.frames import BROADCAST, VNET_HEADER, mac_bytes, packet_socket
from lab.guest import Guest, Image, Nic
from lab.wire import BRIDGE, NIC
from tests.clients.test_dhcp import Server
from tests.netns.conftest import open_queues, records
from tests.netns.test_port import ALL_PROTOCOLS, arp, ethernet, icmpv6, ipv4, ipv6, local, snap, udp
from tests.runner import config
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.wire import Lab, Netns
    from tests.runner import Plugin

pytestmark = pytest.mark.vm

PEER, OWN, OTHER, VIRTUAL = "10.77.0.254", "10.77.0.9", "10.77.0.77", "10.77.0.100"
ROUTER6, OTHER6, STABLE = "2001:db8:77::1", "2001:db8:77::bad", "2001:db8:77:0:7217::1"
SPOOFED, VRRP = "02:00:00:00:00:79", "00:00:5e:00:01:07"
POLICY = f"""
interfaces:
- name: guarded
  source: {{dev: SOURCE}}
  port:
    macSpoofCheck: true
    macs: ["{VRRP}"]
    ipSpoofCheck: true
    addresses: [{OWN}, {VIRTUAL}]
    dhcpServer: false
    routerAdvertisements: false
    trunk: []
    broadcast: 1000
    rate: {{out: 1Gbit, in: 1Gbit}}
- name: open
  source: {{dev: SOURCE}}
"""
LEASE = "#!/bin/sh\n[ $1 != bound ] || ip address add $ip/24 dev $interface\n"


class Hostile:
    """A guest on a port, a neighbour on the same device, and the wire: what of the guest's gets to the two."""

    def __init__(self, guest: Guest, mac: str, neighbour: int, wire: int) -> None:
        self.guest, self.mac, self._ears = guest, mac, (neighbour, wire)
        self._sent = 0

    def heard(self, *commands: str, **frames: bytes) -> list[set[bytes]]:
        """The frames that neighbour and wire get of what these commands do, and of the frames with their names."""
        for command in commands:
            self.guest.run(command)
        self._sent += 1
        last = f"last{self._sent}"
        frames[last] = ethernet(b"\x88\xb5", src=self.mac, dst=BROADCAST)
        named = (frame + _mark(name).ljust(64, b"\0") for name, frame in frames.items())
        texts = (base64.b64encode(each).decode() for each in named)
        self.guest.must("; ".join(f"echo {each} | base64 -d | frame 2" for each in texts))
        return [_until(fd, _mark(last)) for fd in self._ears]


def _mark(name: str) -> bytes:
    return f"<<{name}>>".encode()


def _until(fd: int, last: bytes) -> set[bytes]:
    """All frames up to the one with that text."""
    found: set[bytes] = set()
    end = time.monotonic() + LIMIT
    while select.select([fd], [], [], max(0, end - time.monotonic()))[0]:
        frame = os.read(fd, 1 << 16)
        if last in frame:
            return found
        found.add(frame)
    raise AssertionError(f"the last frame did not arrive after {found}")


def _programs(guest: Guest, folder: Path) -> None:
    """Give the guest a program that sends raw frames, and the script of its DHCP client."""
    flags = "-Os -static -nostdlib -ffreestanding -fno-stack-protector -fno-pie -no-pie -Wl,-n -Wl,--build-id=none -s"
    source, made = Path(__file__).with_name("frame.c"), folder / "frame"
    subprocess.run(["cc", *flags.split(), "-o", made, source], check=True, capture_output=True)
    for path, content in (("/bin/frame", made.read_bytes()), ("/bin/lease", LEASE.encode())):
        guest.must(f"echo {base64.b64encode(content).decode()} | base64 -d > {path}; chmod +x {path}")


@contextmanager
def _router(peer: Netns) -> Iterator[Callable[[], object]]:
    """Make the peer a router of IPv6. What it yields sends its advertisement of 2001:db8:77::/64."""

    def opened() -> socket.socket:
        Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("0")
        made = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        return made

    router = peer.call(opened)
    peer.ip(f"address add {ROUTER6}/64 dev eth0 nodad", "address add fe80::1/64 dev eth0 nodad")
    index = peer.links()["eth0"]["ifindex"]
    prefix = ipaddress.ip_address("2001:db8:77::").packed
    option = b"\x03\x04\x40\xc0" + (3600).to_bytes(4) * 2 + bytes(4) + prefix
    message = b"\x86\0\0\0\x40\0" + (1800).to_bytes(2) + bytes(8) + option

    with router:
        yield lambda: router.sendto(message, ("ff02::1", 0, 0, index))


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The guest's kernel and initramfs."""
    with Image() as made:
        yield made


@pytest.mark.parametrize("source", [NIC, BRIDGE], ids=["macvtap", "tap on a bridge"])
def test_a_hostile_guest(lab: Lab, plugin: Plugin, image: Image, tmp_path: Path, source: str) -> None:
    plugin.policy.write_text(POLICY.replace("SOURCE", source))
    lab.node.ip(f"link set {source} promisc on")
    pod, other = lab.pod(), lab.pod()
    mac = plugin("ADD", config(interface="guarded"), netns=pod).ok()["interfaces"][0]["mac"]
    plugin("ADD", config(interface="open"), netns=other, container="c2").ok()
    (record,), (beside,) = records(plugin, pod), records(plugin, other)
    place = pod if source == NIC else lab.node

    def refused() -> dict[str, int]:
        return {
            reason: count for reason, count in place.call(partial(guard.refused, record)).items() if count
        }

    with ExitStack() as stack:
        env = {**os.environ, "VMTAP_RUN": str(plugin.state)}
        guest = stack.enter_context(Guest(image, pod.path, [Nic(mac)], env=env))
        (neighbour,) = open_queues(other, beside)
        stack.callback(os.close, neighbour)
        wire = stack.enter_context(packet_socket(lab.peer, "eth0", ALL_PROTOCOLS))
        guest.ready()
        _programs(guest, tmp_path)

        # What a guest may do. None of what a Linux guest sends by itself is refused.
        lab.peer.ip("route add default dev eth0")
        with Server(lab.peer):
            guest.must("udhcpc -i eth0 -n -q -s /bin/lease")
        assert guest.ping(PEER)
        advertise = stack.enter_context(_router(lab.peer))

        def addresses() -> str:
            advertise()
            return guest.must("ip -6 address show dev eth0 | grep -v tentative")

        until(addresses, "the guest makes no address", lambda found: "2001:db8:77:" in found)
        assert guest.ping(ROUTER6)
        assert refused() == {}
        hostile = Hostile(guest, mac, neighbour, wire.fileno())
        virtual = {
            "VRRP": ethernet(ipv4(OWN, 112, bytes(20), dst="224.0.0.18"), src=VRRP, dst="01:00:5e:00:00:12"),
            "virtual": ethernet(arp(VRRP, VIRTUAL, 1, target=VIRTUAL), src=VRRP, dst=BROADCAST),
        }
        for got in hostile.heard(**virtual):
            assert _names(got) >= virtual.keys()
        assert refused() == {}

        # What it may not.
        tries = {
            "source-mac": ethernet(arp(SPOOFED, OWN), src=SPOOFED, dst=BROADCAST),
            "arp": ethernet(arp(mac, OTHER), src=mac, dst=BROADCAST),
            "ipv4": ethernet(ipv4(OTHER, 17, udp(1, 2)), src=mac, dst=BROADCAST),
            "ipv6": ethernet(ipv6(OTHER6, 17, udp(1, 2)), src=mac, dst=BROADCAST),
            "neighbour": ethernet(ipv6(local(mac), 58, icmpv6(136, OTHER6)), src=mac, dst=BROADCAST),
            "router": ethernet(ipv6(local(mac), 58, icmpv6(134)), src=mac, dst=BROADCAST),
            "dhcp-server": ethernet(ipv4(OWN, 17, udp(67, 68)), src=mac, dst=BROADCAST),
            "tag-sent": ethernet(b"\x88\xb5", src=mac, dst=BROADCAST, tags=((0x8100, 7),)),
            "hidden": ethernet(snap(arp(mac, OTHER)), src=mac, dst=BROADCAST),
        }
        for got in hostile.heard(**tries):
            assert _names(got) & tries.keys() == set()
        assert refused() == dict.fromkeys(tries, 1)
        # With the means of its own kernel: another address, another MAC, an address that it has made up.
        before = refused()
        commands = (
            f"ip address add {OTHER}/24 dev eth0",
            f"arping -c 1 -w 1 -I eth0 -s {OTHER} {PEER}",
            f"ping -c 1 -W 1 -I {OTHER} {PEER}",
            f"ip address add {STABLE}/64 dev eth0; sleep 2; ping6 -c 1 -W 1 -I {STABLE} {ROUTER6}",
            f"ip link set eth0 address {SPOOFED}; ping -c 1 -W 1 {PEER}; arping -c 1 -w 1 -I eth0 {PEER}",
            f"ip link set eth0 address {mac}",
        )
        for got in hostile.heard(*commands):
            assert not [each for each in got if _is_spoofed(each)]
        now = refused()
        assert all(now[each] > before[each] for each in ("source-mac", "arp", "ipv6")), (before, now)
        # Without the port each of them arrives: the test would see it.
        place.call(partial(guard.remove, record))
        for got in hostile.heard(*commands, **tries):
            assert _names(got) >= tries.keys()
            assert [each for each in got if _is_spoofed(each)]
        assert guest.power_off() == 0


def _names(frames: set[bytes]) -> set[str]:
    return {each.partition(b"<<")[2].partition(b">>")[0].decode(errors="replace") for each in frames}


def _is_spoofed(frame: bytes) -> bool:
    """Whether the frame has another source than the guest's, in what its own kernel sends."""
    addresses = (ipaddress.ip_address(each).packed for each in (OTHER, STABLE))
    return b"<<" not in frame and (
        mac_bytes(SPOOFED) in frame[: VNET_HEADER + 12] or any(each in frame for each in addresses)
    )
