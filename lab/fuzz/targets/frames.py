"""A frame of a guest or from the wire: packet.source and packet.announces, and what vmtapctl capture prints of it."""

from __future__ import annotations

from cni.ctl import dissect
from cni.kernel import packet
from lab.fuzz import claims
from lab.fuzz.targets import Target


def run(data: bytes) -> None:
    """Look at data as the first bytes of a frame."""
    assert len(packet.source(data)) <= 6
    if packet.announces(data):
        assert data[12:14] in (b"\x80\x35", b"\x08\x06")
    seen = dissect.seen(data)
    claims.typed(seen)
    claims.printable(seen.protocol)
    claims.printable(seen.info)


TARGET = Target(run, words=("\x08\x06", "\x08\0", "\x86\xdd", "\x81\0"), most_bytes=2 * packet.KEPT_BYTES)
