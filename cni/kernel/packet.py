"""Packet sockets that hear a guest on its link, or some MACs on a wire (packet(7)).

A filter in the kernel passes only the frames that are waited for, so no process wakes up for others. Closing a packet
socket can wait for an RCU grace period, 15 ms. CAP_NET_RAW is needed. Must not send.
"""

from __future__ import annotations

import socket

from cni.kernel import bpf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

ETH_P_ALL = 0x0003
ETH_P_ARP = 0x0806
ETH_P_RARP = 0x8035
MOST = 200
"""MACs in one filter: a filter and its successor must fit into net.core.optmem_max, which was 20 kB for long."""

_OUTGOING = 4  # PACKET_OUTGOING, linux/if_packet.h
_PKTTYPE = 0xFFFFF000 + 4  # SKF_AD_OFF + SKF_AD_PKTTYPE, linux/filter.h
_LD_B = 0x30
KEPT_BYTES = 64
"""Of each frame: an ARP packet has 42."""
_DROP = (bpf.BPF_RET_K, 0, 0, 0)
_KEEP = (bpf.BPF_RET_K, 0, 0, KEPT_BYTES)
_KEPT = bpf.assemble([_KEEP])
_GUEST = bpf.assemble([(_LD_B, 0, 0, _PKTTYPE), (bpf.BPF_JEQ_K, 0, 1, _OUTGOING), _KEEP, _DROP])
_FROM_OUTSIDE = bpf.assemble(
    [(_LD_B, 0, 0, _PKTTYPE), (bpf.BPF_JEQ_K, 0, 1, _OUTGOING), _DROP, (bpf.BPF_LD_W_ABS, 0, 0, 8)]
)


def permitted() -> bool:
    """Whether the process may open packet sockets."""
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except PermissionError:
        return False
    return True


def guest(ifname: str) -> socket.socket:
    """A socket that receives what the guest of the macvtap sends. Raises OSError.

    The calling thread is in the link's network namespace. The kernel itself sends nothing on the link (ipv6.py).
    """
    return _open(ifname, ETH_P_ALL, _GUEST)


def wire(ifname: str, protocol: int, macs: Iterable[bytes]) -> socket.socket:
    """A socket that receives frames from the MACs that come in on the link, and few others. Raises OSError.

    protocol: an ethertype, or ETH_P_ALL. macs: of six bytes each, at most MOST.
    """
    return _open(ifname, protocol, _sources(macs))


def listen_for(receiver: socket.socket, macs: Iterable[bytes]) -> None:
    """Change the MACs of a wire() socket. Raises OSError."""
    bpf.attach(receiver, _sources(macs))


def source(frame: bytes) -> bytes:
    """The frame's source MAC."""
    return frame[6:12]


def announces(frame: bytes) -> bool:
    """Whether the frame is a RARP packet, as QEMU sends it after a migration, or a gratuitous ARP packet (RFC 5227)."""
    protocol = int.from_bytes(frame[12:14])
    return protocol == ETH_P_RARP or (
        protocol == ETH_P_ARP and len(frame) >= 42 and frame[28:32] == frame[38:42]
    )


def _sources(macs: Iterable[bytes]) -> bytes:
    """A filter for frames from outside whose source ends with the last four bytes of one of the MACs.

    That is one load and two instructions for each MAC; the receiver compares the whole MAC.
    """
    each = [bpf.INSTRUCTION.pack(bpf.BPF_JEQ_K, 0, 1, int.from_bytes(mac[2:])) + _KEPT for mac in macs]
    return b"".join([_FROM_OUTSIDE, *each, bpf.assemble([_DROP])])


def _open(ifname: str, protocol: int, code: bytes) -> socket.socket:
    receiver = socket.socket(
        socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0
    )  # 0: receives nothing yet
    try:
        bpf.attach(receiver, code)
        receiver.bind((ifname, protocol))
    except BaseException:
        receiver.close()
        raise
    return receiver
