"""A frame of a guest or from the wire: packet.source and packet.announces."""

from __future__ import annotations

from cni.kernel import packet
from lab.fuzz.targets import Target


def run(data: bytes) -> None:
    """Look at data as the first bytes of a frame."""
    assert len(packet.source(data)) <= 6
    if packet.announces(data):
        assert data[12:14] in (b"\x80\x35", b"\x08\x06")


TARGET = Target(run, words=("\x08\x06", "\x08\0"), most_bytes=packet.KEPT_BYTES)
