"""packet.py: which frames the kernel passes to a socket that listens for a guest, or for MACs on a wire."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from cni.kernel import macvtap, packet
from cni.kernel.rtnl import Rtnl
from lab.frames import mac_bytes, packet_socket
from lab.wire import NIC
from tests.migration.conftest import arp, rarp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab

OURS, ANOTHER, MARKER = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"


def heard(receiver: socket.socket, marker: str) -> list[bytes]:
    """The frames that have come up to the marker's, which is sent last."""
    receiver.settimeout(60)
    frames: list[bytes] = []
    while not frames or packet.source(frames[-1]) != mac_bytes(marker):
        frames.append(receiver.recv(packet.KEPT_BYTES))
    return frames[:-1]


@pytest.fixture
def ends(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Senders: the machine on the wire, and the node itself, on the node's NIC."""
    with packet_socket(lab.peer, "eth0") as outside, packet_socket(lab.node, NIC) as inside:
        yield outside, inside


@pytest.mark.parametrize("protocol", [packet.ETH_P_ARP, packet.ETH_P_ALL])
def test_a_wire_is_heard_for_its_macs_only_and_not_what_the_node_sends(
    lab: Lab, ends: tuple[socket.socket, socket.socket], protocol: int
) -> None:
    outside, inside = ends
    macs = [mac_bytes(OURS), mac_bytes(MARKER)]
    with lab.node.call(lambda: packet.wire(NIC, protocol, macs)) as wire:
        inside.send(arp(OURS))
        for frame in (arp(ANOTHER), arp(OURS), arp(MARKER)):
            outside.send(frame)
        assert [packet.source(frame) for frame in heard(wire, MARKER)] == [mac_bytes(OURS)]
        packet.listen_for(wire, [mac_bytes(ANOTHER), mac_bytes(MARKER)])
        for frame in (arp(OURS), arp(ANOTHER), arp(MARKER)):
            outside.send(frame)
        assert [packet.source(frame) for frame in heard(wire, MARKER)] == [mac_bytes(ANOTHER)]


def test_as_many_macs_as_a_filter_can_have(lab: Lab, ends: tuple[socket.socket, socket.socket]) -> None:
    macs = [number.to_bytes(6) for number in range(1 << 41, (1 << 41) + packet.MOST)]
    with lab.node.call(lambda: packet.wire(NIC, packet.ETH_P_ARP, macs)) as wire:
        for _ in range(3):  # a filter is replaced by another as large
            for mac in (macs[0], macs[100], macs[-1]):
                ends[0].send(arp(mac.hex(":")))
            assert [packet.source(frame) for frame in heard(wire, macs[-1].hex(":"))] == [macs[0], macs[100]]
            packet.listen_for(wire, macs)


def test_what_announces() -> None:
    assert packet.announces(rarp(OURS))
    assert packet.announces(arp(OURS, announcement=True))
    assert not packet.announces(arp(OURS))
    assert not packet.announces(b"\xff" * 6 + mac_bytes(OURS) + b"\x08\x00" + bytes(46))


def test_a_mode_is_changed_on_a_living_link(lab: Lab) -> None:
    pod = lab.pod()
    lab.node.ip(f"link add link {NIC} name net1 netns {pod.path} type macvtap mode vepa")

    def change(mode: str) -> None:
        with Rtnl() as there:
            link = there.link(name="net1")
            assert link
            macvtap.set_mode(there, link.index, mode)

    for mode in ("bridge", "vepa", "bridge"):
        pod.call(lambda mode=mode: change(mode))  # type: ignore[misc]
        assert pod.links()["net1"]["linkinfo"]["info_data"]["mode"] == mode
    with pytest.raises(OSError, match="No such device"), Rtnl() as here:
        macvtap.set_mode(here, 0x7FFFFFF0, "bridge")
