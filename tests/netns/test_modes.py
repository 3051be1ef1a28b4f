"""Who hears whom in each mode: real frames through the fds that a VM would get."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Any

import pytest

from lab.frames import BROADCAST, Frame, collect, packet_socket, write_tap
from lab.wire import BRIDGE, NIC

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from lab.wire import Lab
    from tests.netns.conftest import Attached

BETWEEN_GUESTS = {
    # device, mode, does the switch reflect: between two guests of one node (unicast, broadcast), own broadcast back
    ("macvtap", "vepa", False): (False, False, False),
    ("macvtap", "vepa", True): (True, True, False),
    ("macvtap", "pepa", False): (False, False, False),
    # The kernel holds back what is reflected only if it is broadcast, and gives that to its own sender.
    ("macvtap", "pepa", True): (True, False, True),
    ("macvtap", "bridge", False): (True, True, False),
    ("macvtap", "bridge", True): (True, True, False),
    ("tap", "bridge", False): (True, True, False),
    ("tap", "pepa", False): (False, False, False),
    # A switch that reflects to a Linux bridge makes it believe that its guests are outside: no such row.
}
"""Everything else is the same in every row: each guest and the peer outside hear each other's unicast and broadcast,
and nothing comes twice."""

PEER_MAC = "02:00:00:00:00:fe"
NODE_MAC = "02:00:00:00:00:01"


def expected(unicast: bool, broadcast: bool, echo: bool) -> dict[str, list[str]]:
    """What each of a, b and peer hears, as "sender unicast" or "sender broadcast"."""
    heard: dict[str, list[str]] = {name: [] for name in ("a", "b", "peer")}
    for sender, receiver in permutations(heard, 2):
        outside = "peer" in (sender, receiver)
        heard[receiver] += [f"{sender} unicast"] if unicast or outside else []
        heard[receiver] += [f"{sender} broadcast"] if broadcast or outside else []
    for guest in ("a", "b"):
        heard[guest] += [f"{guest} broadcast"] if echo else []
    return {name: sorted(tokens) for name, tokens in heard.items()}


def heard(
    macs: dict[str, str], ports: dict[str, int | socket.socket], wanted: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Lets everybody send to everybody; who got what, and what came twice is there twice. Waits for what is wanted."""

    def send(sender: str, frame: Frame) -> None:
        port = ports[sender]
        if isinstance(port, int):
            write_tap(port, frame)
        else:
            port.send(frame.pack())

    for sender, receiver in permutations(macs, 2):
        send(sender, Frame(macs[receiver], macs[sender], f"{sender} unicast"))
    for sender, mac in macs.items():
        send(sender, Frame(BROADCAST, mac, f"{sender} broadcast"))
    send("peer", Frame(BROADCAST, macs["peer"], "marker"))
    send("node", Frame(BROADCAST, NODE_MAC, "marker"))
    guests_and_peer = {name: port for name, port in ports.items() if name != "node"}

    def by_name(got: dict[str, list[Frame]]) -> dict[str, list[str]]:
        return {
            name: sorted(frame.token for frame in frames if frame.dst in (macs[name], BROADCAST))
            for name, frames in got.items()
        }

    def enough(got: dict[str, list[Frame]]) -> bool:
        return all(set(wanted[name]) <= set(tokens) for name, tokens in by_name(got).items())

    return by_name(collect(guests_and_peer, until="marker", enough=enough))


@pytest.mark.parametrize(("device", "mode", "reflecting"), BETWEEN_GUESTS)
def test_mode(lab: Lab, attach: Callable[..., Attached], device: str, mode: str, reflecting: bool) -> None:
    source = NIC if device == "macvtap" else BRIDGE
    lab.switch.reflect(reflecting)
    lab.peer.ip(f"link set eth0 address {PEER_MAC}")
    fields: dict[str, Any] = {"source": source, "device": device, "mode": mode}
    a = attach(lab.pod("a"), container="a", **fields)
    b = attach(lab.pod("b"), container="b", **fields)
    macs = {"a": a.record.mac, "b": b.record.mac, "peer": PEER_MAC}
    wanted = expected(*BETWEEN_GUESTS[device, mode, reflecting])
    with packet_socket(lab.peer, "eth0") as peer, packet_socket(lab.node, source) as node:
        got = heard(macs, {"a": a.fd, "b": b.fd, "peer": peer, "node": node}, wanted)
    assert got == wanted
