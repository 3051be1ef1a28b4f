"""A guest's packet socket, filters in little memory (packet.py), a mode changed under open queues (macvtap.py)."""

from __future__ import annotations

import os
import select
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from cni.kernel import macvtap, packet
from cni.kernel.rtnl import Rtnl
from lab.frames import Frame, collect, mac_bytes, packet_socket, write_tap
from lab.wire import NIC
from tests.migration.conftest import rarp
from tests.waiting import LIMIT

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from lab.wire import Lab
    from tests.netns.conftest import Attached

FOREIGN = "02:00:00:00:00:78"


def test_the_guest_is_heard_and_not_what_it_receives(lab: Lab, attach: Callable[..., Attached]) -> None:
    made = attach(lab.pod(), source=NIC, mode="vepa")
    with (
        closing(made.pod.call(lambda: packet.guest("net1"))) as heard,
        packet_socket(lab.peer, "eth0") as peer,
    ):
        peer.send(Frame(made.record.mac, FOREIGN, "to the guest").pack())
        collect({"guest": made.fd}, until="to the guest")
        sent = Frame(FOREIGN, made.record.mac, "from the guest")
        write_tap(made.fd, sent)
        assert next_of(heard) == sent.pack()[: packet.KEPT_BYTES]
        assert nothing_more(heard)


@pytest.mark.parametrize("optmem", [20480, 131072])
def test_one_filter_has_room_for_so_many_macs(lab: Lab, optmem: int) -> None:
    """With the memory that Linux allows before and since 6.7; the filter is replaced by one as large."""
    macs = [
        mac_bytes(f"fe:00:ff:ff:{number >> 8:02x}:{number & 255:02x}") for number in range(2 * packet.MOST)
    ]
    first, second = macs[: packet.MOST], macs[packet.MOST :]
    if lab.node.run(["test", "-e", "/proc/sys/net/core/optmem_max"], check=False).returncode == 0:
        # It is of each network namespace since Linux 6.7; before, only the first one has it.
        lab.node.run(["sysctl", "-qw", f"net.core.optmem_max={optmem}"])
    with (
        closing(lab.node.call(lambda: packet.wire(NIC, packet.ETH_P_RARP, first))) as heard,
        packet_socket(lab.peer, "eth0") as peer,
    ):
        assert hears(peer, heard, [*second, *first], first)
        packet.listen_for(heard, second)
        assert hears(peer, heard, [*first, *second], second)


def test_a_mode_is_changed_under_open_queues(lab: Lab, attach: Callable[..., Attached]) -> None:
    """Frames that were queued before are read afterwards, by the fds of before."""
    made = attach(lab.pod(), source=NIC, mode="vepa", queues=2)
    pair = attach(lab.pod(), source=NIC, mode="bridge", container="c2")
    inodes = [os.fstat(fd).st_ino for fd in made.fds]
    with made.pod.call(Rtnl) as pod, packet_socket(lab.peer, "eth0") as peer:
        peer.send(Frame(made.record.mac, FOREIGN, "before").pack())
        for mode, shown in (
            ("bridge", "bridge"),
            ("vepa", "vepa"),
            ("pepa", "private"),
            ("bridge", "bridge"),
        ):
            macvtap.set_mode(pod, made.record.ifindex, mode)
            assert made.link()["linkinfo"]["info_data"]["mode"] == shown
        peer.send(Frame(made.record.mac, FOREIGN, "after").pack())
        assert any_of(made.fds) == "before"
        assert any_of(made.fds) == "after"
        write_tap(pair.fd, Frame(made.record.mac, pair.record.mac, "beside"))
        assert any_of(made.fds) == "beside"
        assert [os.fstat(fd).st_ino for fd in made.fds] == inodes
        with pytest.raises(OSError, match="No such device"):
            macvtap.set_mode(pod, made.record.ifindex + 1, "vepa")


def hears(peer: socket.socket, heard: socket.socket, sent: list[bytes], wanted: list[bytes]) -> bool:
    """Whether it hears exactly those MACs; the last one that is sent is wanted."""
    got = []
    for mac in sent:
        peer.send(rarp(mac.hex(":")))
        if mac in wanted:  # one by one, for a socket's buffer does not hold them all
            got.append(packet.source(next_of(heard)))
    return got == wanted and nothing_more(heard)


def next_of(heard: socket.socket) -> bytes:
    assert select.select([heard], [], [], LIMIT)[0], "nothing was heard"
    return heard.recv(1 << 16)


def nothing_more(heard: socket.socket) -> bool:
    """Of what has come by now: what was sent later than this has been heard."""
    return not select.select([heard], [], [], 0)[0]


def any_of(fds: list[int]) -> str:
    """The token of the next frame on any of the queues."""
    ready, _, _ = select.select(fds, [], [], LIMIT)
    assert ready, "nothing arrived"
    return os.read(ready[0], 1 << 16)[10 + 14 :].rstrip(b"\0").decode()
