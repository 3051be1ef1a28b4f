"""What a switch announces: LLDP frames, and what lldpd has made of such."""

from __future__ import annotations

from cni.ctl import lldp
from cni.kernel import lldp as frames
from lab.fuzz import claims
from lab.fuzz.targets import Target

_IDENTIFIER = bytes.fromhex("0080c20d")


def run(data: bytes) -> None:
    """Parse data as a frame and as the output of lldpcli: what comes of it may be printed on a terminal."""
    if neighbour := frames.parse(data):
        _shown(neighbour)
    assert 0 <= frames.seconds(data) < 1 << 16
    if evb := frames.parse_evb(data):
        claims.typed(evb)
        assert _IDENTIFIER in data
    try:
        known = lldp.of_lldpcli(data)
    except ValueError:
        return
    for nic, each in known.items():
        claims.printable(nic)
        _shown(each)


def _shown(neighbour: frames.Neighbour) -> None:
    claims.typed(neighbour)
    claims.printable(neighbour.system)
    claims.printable(neighbour.port)


_WORDS = ("lldp", "interface", "chassis", "port", "name", "id", "value", "type", "mac", "descr")
TARGET = Target(run, words=(*_WORDS, "\0\x80\xc2\x0d"), json=True, most_bytes=1500)
