"""What the parts of a port cost each frame: through the fd of one attachment, with one part after the other in force.

Must not make attachments but by contenders.py.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import struct
import subprocess
from typing import TYPE_CHECKING

from cni.kernel import netns, nft, tapdev
from cni.kernel.rtnl import Rtnl
from cni.port import filter as filters
from cni.port import limit
from cni.state.port_profile import Port
from cni.state.store import Store
from lab.assets.programs import BENCH
from lab.bench.contenders import Place
from lab.bench.node import turns
from lab.frames import VNET_HEADER, mac_bytes, packet_socket
from lab.process import LabError

if TYPE_CHECKING:
    from cni.state.record import Record
    from lab.bench.contenders import Agent, Contender
    from lab.bench.spawn import Spawner
    from lab.wire import Lab, Netns

NONE = "no port"
_RATE = 10**11
"""Bit/s: more than passes, so that the limit is looked at and nothing is held back."""
PARTS = {
    NONE: Port(),
    "macSpoofCheck": Port(mac_spoof_check=True),
    "trunk: []": Port(trunk=()),
    "broadcast": Port(broadcast=1_000_000),
    "dhcpServer: false": Port(dhcp_server=False),
    "routerAdvertisements: false": Port(router_advertisements=False),
    "ipSpoofCheck": Port(ip_spoof_check=True),
    "rate": Port(out_rate=_RATE, in_rate=_RATE),
    "all of them": Port(
        mac_spoof_check=True,
        ip_spoof_check=True,
        dhcp_server=False,
        router_advertisements=False,
        trunk=(),
        broadcast=1_000_000,
        out_rate=_RATE,
        in_rate=_RATE,
    ),
}
WAYS = ("out", "in")
"""What the guest sends; what it receives."""
_ADDRESS, _OTHER = "10.77.0.9", "10.77.0.10"
_LENGTH = 98
"""Of each frame, in bytes: a UDP packet of 56 bytes."""
_OTHER_MAC = "02:00:00:00:00:78"
_BURST = 400
"""Frames that the queue of the fd has room for."""

_ARRIVE_SECONDS = 10.0

Frames = dict[str, dict[str, list[float]]]
"""Part → way → nanoseconds a frame, for each round."""


def frames(
    spawner: Spawner, contender: Contender, agent: Agent, lab: Lab, pod: Netns, *, rounds: int, count: int
) -> Frames:
    """The time of a frame with each part in each round, over count frames. Raises LabError."""
    place = Place(pod.path, "bench-frames")
    contender.call(spawner, "ADD", [place])
    (record,) = (each for each in Store(agent.run).records() if each.container_id == place.container)
    taken: Frames = {part: {way: [] for way in WAYS} for part in PARTS}
    with contextlib.ExitStack() as stack:
        fd = _opened(stack, pod, record)
        peer = stack.enter_context(packet_socket(lab.peer, "eth0", 0))
        for number, order in enumerate(turns(list(PARTS), rounds + 1)):
            for part in order:
                _put(pod, record, PARTS[part])
                _drain(fd, 0)
                to_wire = _write(fd, bytes(VNET_HEADER) + _frame(record.mac, _OTHER_MAC), count)
                to_guest = []
                for _ in range(count // _BURST):
                    to_guest.append(_write(peer.fileno(), _frame(_OTHER_MAC, record.mac), _BURST))
                    _drain(fd, _BURST)
                if number:
                    taken[part]["out"].append(to_wire)
                    taken[part]["in"].append(sum(to_guest) / len(to_guest))
    contender.call(spawner, "DEL", [place])
    return taken


def _opened(stack: contextlib.ExitStack, pod: Netns, record: Record) -> int:
    """An fd of the attachment's device, which does not block."""
    namespace = netns.open_path(str(pod.path))
    stack.callback(os.close, namespace)
    (fd,) = tapdev.open_queues(namespace, record, 1)
    stack.callback(os.close, fd)
    os.set_blocking(fd, False)
    return fd


def _put(pod: Netns, record: Record, port: Port) -> None:
    """Put the part in force, and nothing else."""
    pod.run(["tc", "qdisc", "del", "dev", record.ifname, "root"], check=False)

    def inside() -> None:
        with nft.opened() as netlink, Rtnl() as own:
            filters.remove(netlink, record.ifname)
            if port != Port():
                filters.install(netlink, record.ifname, port, record.mac, [_ADDRESS])
            if port.out_rate:
                limit.shape(own, record.ifindex, port.out_rate, None)

    pod.call(inside)


def _frame(src: str, dst: str) -> bytes:
    """A UDP packet from an address that the port allows."""
    addresses = ipaddress.ip_address(_ADDRESS).packed + ipaddress.ip_address(_OTHER).packed
    head = b"\x45\0" + (_LENGTH - 14).to_bytes(2) + bytes(4) + b"\x40\x11"
    checksum = (
        ~(sum(struct.unpack("!9H", head + addresses)) % 0xFFFF) & 0xFFFF
    )  # a bridge drops packets without it
    packet = head + checksum.to_bytes(2) + addresses + b"\x27\x10\x27\x11\0\x40\0\0"
    frame: bytes = mac_bytes(dst) + mac_bytes(src) + b"\x08\0" + packet
    return frame.ljust(_LENGTH, b"\0")


def _write(fd: int, frame: bytes, count: int) -> float:
    """Nanoseconds a frame."""
    argv = [str(BENCH.get() / "frames"), str(fd), str(count)]
    done = subprocess.run(argv, input=frame, pass_fds=[fd], capture_output=True, check=False)
    if done.returncode:
        raise LabError(f"a frame could not be written: status {done.returncode}")
    return float(done.stdout)


def _drain(fd: int, count: int) -> None:
    """Read what waits, and as many frames as must come. Raises LabError if they do not."""
    while True:
        try:
            os.read(fd, 1 << 11)
            count -= 1
        except BlockingIOError:
            if count <= 0:
                return
            if not select.select([fd], [], [], _ARRIVE_SECONDS)[0]:
                raise LabError(f"{count} frames to the guest were lost") from None
