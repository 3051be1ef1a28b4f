"""The blocks of a pcapng file with one interface (draft-ietf-opsawg-pcapng). Pure.

Unlike classic pcap, pcapng marks each frame as sent or received, and has the number of lost frames.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER, _UNKNOWN_LENGTH = 0x1A2B3C4D, -1
_LINKTYPE_ETHERNET = 1
_COMMENT, _USER_APPLICATION = 1, 4
_IF_NAME, _IF_TSRESOL, _IF_FILTER = 2, 9, 11
_NANOSECONDS = b"\x09"
_EPB_FLAGS = 2
_ISB_FILTERACCEPT, _ISB_IFDROP = 6, 5
_PACKET_HEAD = struct.Struct("=7I")
_FLAGS = {out: struct.pack("=HHI", _EPB_FLAGS, 4, 2 if out else 1) + bytes(4) for out in (True, False)}
"""Option epb_flags: outbound or inbound; and the end of the options."""


def head(name: str, comment: str, filter: str, snap: int) -> bytes:
    """The beginning of the file. name, comment: of the interface. snap: the most bytes of a frame."""
    section = struct.pack("=IHHq", _BYTE_ORDER, 1, 0, _UNKNOWN_LENGTH)
    options = [(_IF_NAME, name.encode()), (_COMMENT, comment.encode()), (_IF_TSRESOL, _NANOSECONDS)]
    if filter:
        options.append((_IF_FILTER, b"\0" + filter.encode(errors="replace")))  # 0: as text
    interface = struct.pack("=HHI", _LINKTYPE_ETHERNET, 0, snap)
    return _block(_SECTION, section + _options([(_USER_APPLICATION, b"vmtapctl")])) + _block(
        _INTERFACE, interface + _options(options)
    )


def frame(data: bytes, size: int, time: int, *, out: bool) -> bytes:
    """One frame. data: what is kept of it; size: the whole frame's; time: in ns since 1970; out: sent by the guest."""
    padding = -len(data) % 4
    total = 28 + len(data) + padding + 12 + 4
    return b"".join(
        (
            _PACKET_HEAD.pack(_PACKET, total, 0, time >> 32, time & 0xFFFFFFFF, len(data), size),
            data,
            bytes(padding),
            _FLAGS[out],
            struct.pack("=I", total),
        )
    )


def statistics(time: int, frames: int, drops: int) -> bytes:
    """The end of the file: how many frames are in it, and how many the kernel lost."""
    counts = [(_ISB_IFDROP, struct.pack("=Q", drops)), (_ISB_FILTERACCEPT, struct.pack("=Q", frames))]
    return _block(_STATISTICS, struct.pack("=III", 0, time >> 32, time & 0xFFFFFFFF) + _options(counts))


def _block(kind: int, body: bytes) -> bytes:
    total = struct.pack("=I", 12 + len(body))
    return struct.pack("=I", kind) + total + body + total


def _options(options: Iterable[tuple[int, bytes]]) -> bytes:
    """The options, each padded to four bytes, and their end."""
    return b"".join(
        struct.pack("=HH", kind, len(value)) + value + bytes(-len(value) % 4)
        for kind, value in (*options, (0, b""))
    )
