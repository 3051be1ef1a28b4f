"""A guest's throughput: over the fd of our macvtap, of our tap on a bridge, and QEMU's user networking.

There are three guests, each on one medium. They are measured one at a time, in turn. The other end is a socket on the
peer machine; the guest's end is busybox' nc. Must not make attachments but by contenders.py.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.bench.contenders import Place, tap_on_bridge
from lab.bench.node import turns
from lab.guest import Guest, Image, Nic
from lab.process import LabError
from lab.wire import NIC, PEER_ADDRESS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lab.bench.contenders import Agent, Contender
    from lab.bench.node import Extent
    from lab.bench.spawn import Spawner
    from lab.wire import Lab

MACVTAP = "macvtap"
TAP = "tap on a bridge"
USER = "QEMU's user networking"
DIRECTIONS = ("TX", "RX")
"""The guest sends; the guest receives."""
_PEER = PEER_ADDRESS.partition("/")[0]
_USER_ADDRESS, _USER_GATEWAY = "10.0.2.15/24", "10.0.2.2"
_BLOCK = bytes(1 << 16)
_BEGIN_SECONDS = 20.0

Rates = dict[str, dict[str, list[float]]]
"""Medium → direction → megabytes a second, for each round."""


@dataclass
class _Traffic:
    """The traffic of the peer's socket."""

    bytes: int = 0
    seconds: float = 0.0
    error: OSError | None = None


def throughput(
    spawner: Spawner,
    contender: Contender,
    agent: Agent,
    lab: Lab,
    *,
    extent: Extent,
    progress: Callable[[str], None],
) -> Rates:
    """Measures every medium and direction for extent.guest_seconds in each round. Raises LabError."""
    macvtap, tap = lab.pod("macvtap"), lab.pod("tap")
    attached = [
        (contender, Place(macvtap.path, "bench-macvtap")),
        (tap_on_bridge(agent), Place(tap.path, "bench-tap")),
    ]
    lab.node.ip(f"address add 10.77.0.253/24 dev {NIC}")  # connections of user networking begin on the node
    for plugin, place in attached:
        plugin.call(spawner, "ADD", [place])
    env = {"VMTAP_RUN": str(agent.run)}
    progress("three guests boot")
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(Image())
        macs = [_mac(agent, place) for _, place in attached]
        guests = {
            MACVTAP: Guest(image, macvtap.path, [Nic(macs[0], "10.77.0.1/24")], env=env),
            TAP: Guest(image, tap.path, [Nic(macs[1], "10.77.0.2/24")], env=env),
            USER: Guest(image, lab.node.path, [Nic("52:54:00:12:34:56", _USER_ADDRESS)], user_network=True),
        }
        for guest in guests.values():
            stack.enter_context(guest)
        for guest in guests.values():
            guest.ready()
        guests[USER].must(f"ip route add default via {_USER_GATEWAY}")
        rates = _rounds(lab, guests, extent, progress)
    for plugin, place in attached:
        plugin.call(spawner, "DEL", [place])
    return rates


def _rounds(lab: Lab, guests: Mapping[str, Guest], extent: Extent, progress: Callable[[str], None]) -> Rates:
    rates: Rates = {medium: {direction: [] for direction in DIRECTIONS} for medium in guests}
    for number, order in enumerate(turns(list(guests), extent.guest_rounds + 1)):
        for medium in order:
            for direction in DIRECTIONS:
                progress(f"round {number} of {extent.guest_rounds}: {medium}, {direction}")
                seconds = (
                    extent.guest_seconds if number else 0.5
                )  # the first round warms up, and resolves the peer's MAC
                rate = _rate(lab, guests[medium], direction, seconds)
                if number:
                    rates[medium][direction].append(rate)
    return rates


def _rate(lab: Lab, guest: Guest, direction: str, seconds: float) -> float:
    traffic = _Traffic()
    with lab.peer.call(_listener) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=_exchange, args=(listener, direction, seconds, traffic))
        thread.start()
        # -e gives the socket to dd; nc itself copies 1 KiB at a time.
        dd = "dd if=/dev/zero bs=64k" if direction == "TX" else "dd of=/dev/null bs=64k"
        answer = guest.run(f"timeout {int(seconds) + 10} nc {_PEER} {port} -e {dd}", seconds + 30)
        thread.join(seconds + _BEGIN_SECONDS)
    if traffic.error or not traffic.bytes:
        raise LabError(f"the guest had no traffic: {traffic.error or answer.output.strip()}")
    return traffic.bytes / traffic.seconds / 1e6


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.settimeout(_BEGIN_SECONDS)
    listener.bind((_PEER, 0))
    listener.listen(1)
    return listener


def _exchange(listener: socket.socket, direction: str, seconds: float, traffic: _Traffic) -> None:
    """The peer's end: receives or sends for the given seconds, and closes the connection."""
    try:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(_BEGIN_SECONDS)
            begin = time.monotonic()
            while traffic.seconds < seconds:
                moved = len(connection.recv(1 << 20)) if direction == "TX" else connection.send(_BLOCK)
                if not moved:
                    break
                traffic.bytes += moved
                traffic.seconds = time.monotonic() - begin
    except OSError as error:
        traffic.error = error


def _mac(agent: Agent, place: Place) -> str:
    """The guest's MAC, from the attachment's record: the tap itself has another."""
    for record in (agent.run / "attachments").glob("*.json"):
        fields = json.loads(record.read_bytes())
        if fields["container_id"] == place.container:
            return str(fields["mac"])
    raise LabError(f"vmtapd has no record of {place.container}")
