"""The lab's wires do what the picture in lab/wire.py says, and leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.frames import BROADCAST, ETHERTYPE, Frame, collect, packet_socket, unpack, write_tap
from lab.process import LabError
from lab.wire import BRIDGE, NIC, Lab, Netns

NODE_MAC = "02:00:00:00:00:01"
ETH_P_ALL = 0x0003


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.mark.parametrize("link", [NIC, BRIDGE])
def test_the_node_reaches_the_peer(lab: Lab, link: str) -> None:
    with packet_socket(lab.node, link) as node, packet_socket(lab.peer, "eth0") as peer:
        frame = Frame(BROADCAST, NODE_MAC, "hello")
        node.send(frame.pack())
        node.send(Frame(BROADCAST, NODE_MAC, "marker").pack())
        assert collect({"peer": peer}, until="marker") == {"peer": [frame]}


def test_the_switch_reflects_only_when_told_to(lab: Lab) -> None:
    with packet_socket(lab.node, NIC) as node, packet_socket(lab.peer, "eth0") as peer:

        def send(token: str) -> list[str]:
            node.send(Frame(BROADCAST, NODE_MAC, token).pack())
            peer.send(Frame(BROADCAST, "02:00:00:00:00:02", "marker").pack())
            return [frame.token for frame in collect({"node": node}, until="marker")["node"]]

        assert send("one") == []
        lab.switch.reflect(True)
        assert send("two") == ["two"]
        lab.switch.reflect(False)
        assert send("three") == []


def test_the_wires_are_silent(lab: Lab) -> None:
    with packet_socket(lab.peer, "eth0", ETH_P_ALL) as peer:
        lab.node.ip(f"link set {NIC} down", f"link set {NIC} up")
        assert collect({"peer": peer}, timeout=1.5) == {"peer": []}


def test_mtu() -> None:
    with Lab(mtu=9000) as lab:
        assert {name: link["mtu"] for name, link in lab.node.links().items() if name != "lo"} == {
            "eth1": 9000,
            "eth2": 9000,
            "br0": 9000,
        }
        assert lab.peer.links()["eth0"]["mtu"] == 9000


def test_pods_have_ipv6_and_the_machines_of_the_lab_do_not(lab: Lab) -> None:
    def ipv6_is_off() -> str:
        return Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").read_text().strip()

    assert lab.pod().call(ipv6_is_off) == "0"
    assert [machine.call(ipv6_is_off) for machine in (lab.node, lab.switch, lab.peer)] == ["1", "1", "1"]


def test_everything_goes_also_after_an_error() -> None:
    paths: list[Path] = []
    with pytest.raises(LabError, match="Unknown device type"), Lab() as lab:
        paths = [machine.path for machine in (lab.node, lab.switch, lab.peer, lab.pod())]
        lab.node.ip("link add type nonsense")
    mounts = Path("/proc/self/mountinfo").read_text()
    assert len(paths) == 4
    assert not [path for path in paths if path.exists() or str(path) in mounts]


def test_a_call_leaves_the_callers_thread_where_it_was() -> None:
    def where() -> str:
        return str(Path("/proc/thread-self/ns/net").readlink())

    with Netns("pod") as pod:
        here = where()
        assert pod.call(where) != here
        assert where() == here
        with pytest.raises(ZeroDivisionError):
            pod.call(lambda: 1 // 0)


def test_frames_on_a_fd_carry_a_vnet_header() -> None:
    frame = Frame(BROADCAST, NODE_MAC, "token")
    assert unpack(frame.pack()) == frame
    assert frame.pack()[12:14] == ETHERTYPE.to_bytes(2, "big")
    reader, writer = os.pipe()
    try:
        write_tap(writer, frame)
        assert collect({"tap": reader}, timeout=0.1) == {"tap": [frame]}
        with pytest.raises(TimeoutError, match="'marker' did not arrive at tap"):
            collect({"tap": reader}, until="marker", timeout=0.1)
    finally:
        os.close(reader)
        os.close(writer)
