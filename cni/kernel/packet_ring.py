"""Captures a link's frames through a ring that the kernel fills (packet(7), PACKET_RX_RING, TPACKET_V3).

The kernel copies each frame, cut to a length, into the ring's current block, and hands the block over when it is full
or after 50 ms. A frame that finds no room is counted, so that the ring bounds the memory. Source of the numbers:
linux/if_packet.h. CAP_NET_RAW is needed. Must not send.
"""

from __future__ import annotations

import errno
import mmap
import socket
import struct
from typing import NamedTuple

from cni.kernel import bpf
from cni.kernel.packet import ETH_P_ALL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_SOL_PACKET = 263
_PACKET_RX_RING, _PACKET_STATISTICS, _PACKET_VERSION = 5, 6, 10
_TPACKET_V3 = 2
_BLOCK = 1 << 20
_BLOCKS = 32
_RETIRE_MS = 50
"""After this time, or twice as much, the kernel hands over a block that is not full."""
_FRAME = 1 << 11
"""The kernel checks this size, and does not use it: in version 3 a block has frames of any size."""
_STATUS, _FIRST = 8, 16
"""Offsets in struct tpacket_block_desc: block_status, then num_pkts; offset_to_first_pkt."""
_TP_STATUS_KERNEL, _TP_STATUS_USER = 0, 1
_HEADER = struct.Struct(
    "=IIIIIIHHIIH"
)  # struct tpacket3_hdr: next, s, ns, snaplen, len, status, mac, net, hash, tci, tpid
_PKTTYPE = 48 + 10  # behind the header: struct sockaddr_ll.sll_pkttype
_PACKET_OUTGOING = 4
_TP_STATUS_VLAN_VALID = 1 << 4
_ADDRESSES = 12
"""Bytes of a frame before its tag."""

# linux/filter.h: SKF_AD_OFF and SKF_AD_PKTTYPE, SKF_AD_VLAN_TAG_PRESENT
_PKTTYPE_LOAD = (bpf.BPF_LD_B_ABS, 0, 0, 0xFFFFF000 + 4)
_TAGGED_LOAD = (bpf.BPF_LD_B_ABS, 0, 0, 0xFFFFF000 + 48)
_WHOLE = (bpf.BPF_RET_K, 0, 0, 0xFFFFFFFF)
_NOTHING = (bpf.BPF_RET_K, 0, 0, 0)
_TAGGED_PASS = (_TAGGED_LOAD, (bpf.BPF_JEQ_K, 0, 1, 1), _WHOLE)
_ONLY = {
    None: (),
    True: (_PKTTYPE_LOAD, (bpf.BPF_JEQ_K, 1, 0, _PACKET_OUTGOING), _NOTHING),
    False: (_PKTTYPE_LOAD, (bpf.BPF_JEQ_K, 0, 1, _PACKET_OUTGOING), _NOTHING),
}


class Captured(NamedTuple):
    """data: the frame, or its beginning, with its VLAN tags. size: the whole frame's. time: in ns since 1970.

    sent: whether it leaves by the link; the link has received it otherwise. unjudged: whether the socket's filter has
    passed the frame without a look, because the kernel kept its outer tag apart from it.
    """

    data: bytes
    size: int
    time: int
    sent: bool
    unjudged: bool


class Ring:
    """A capture on the link of that name and index, in the calling thread's network namespace. Raises OSError.

    filter: assembled instructions, which return how many bytes of a frame to keep. They would not see a tag that the
    kernel keeps apart, so they do not run for a frame that has one. sent: True captures only what leaves by the link,
    False only what it receives, None both.
    """

    def __init__(self, ifname: str, ifindex: int, filter: bytes, *, sent: bool | None = None) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # 0: receives nothing yet
        try:
            bpf.attach(self._socket, bpf.assemble([*_ONLY[sent], *_TAGGED_PASS]) + filter)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V3)
            frames = _BLOCK // _FRAME * _BLOCKS
            request = (_BLOCK, _BLOCKS, _FRAME, frames, _RETIRE_MS, 0, 0)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_RX_RING, struct.pack("=7I", *request))
            self._memory = mmap.mmap(self._socket.fileno(), _BLOCK * _BLOCKS)
            self._next = self._taken = self._received = self._drops = 0
            self._socket.bind((ifname, ETH_P_ALL))
            if socket.if_nametoindex(ifname) != ifindex:
                raise OSError(errno.ENODEV, "the link has another index than its attachment")
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when a block is full; POLLERR when the link is down or gone."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the capture and free the ring."""
        self._memory.close()
        self._socket.close()

    def clear_error(self) -> None:
        """Take the socket's error, which would keep POLLERR set."""
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def blocks(self) -> Iterator[list[Captured]]:
        """The frames of each block that the kernel has handed over, at most once through the ring."""
        for _ in range(_BLOCKS):
            start = self._next * _BLOCK
            status, count = struct.unpack_from("=II", self._memory, start + _STATUS)
            if not status & _TP_STATUS_USER:
                return
            frames = list(self._frames(start, count))
            struct.pack_into("=I", self._memory, start + _STATUS, _TP_STATUS_KERNEL)
            self._next = (self._next + 1) % _BLOCKS
            self._taken += count
            yield frames

    def stop(self) -> None:
        """Receive no more frames. Those that are in the ring stay."""
        bpf.attach(self._socket, bpf.assemble([_NOTHING]))

    def counts(self) -> tuple[int, int]:
        """How many frames blocks() has yet to return, and how many have found no room in the ring. Raises OSError."""
        # All frames, those without room, and how often the ring was full. Reading resets them.
        received, drops, _ = struct.unpack(
            "=3I", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12)
        )
        self._received += received
        self._drops += drops
        return self._received - self._drops - self._taken, self._drops

    def _frames(self, block: int, count: int) -> Iterator[Captured]:
        memory = self._memory
        at = block + struct.unpack_from("=I", memory, block + _FIRST)[0]
        for _ in range(count):
            following, seconds, nanoseconds, kept, size, status, mac, _net, _hash, tci, tpid = (
                _HEADER.unpack_from(memory, at)
            )
            data = memory[at + mac : at + mac + kept]
            apart = bool(status & _TP_STATUS_VLAN_VALID)
            if apart:
                data = data[:_ADDRESSES] + struct.pack("!HH", tpid, tci) + data[_ADDRESSES:]
                size += 4
            sent = memory[at + _PKTTYPE] == _PACKET_OUTGOING
            yield Captured(data, size, seconds * 10**9 + nanoseconds, sent, apart)
            at += following
