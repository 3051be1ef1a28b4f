"""A shim's request: wire.parse of a whole one, and wire.receive of one that arrives in two parts."""

from __future__ import annotations

import os
import socket

from cni.agent import wire
from lab.fuzz.targets import Target


def run(data: bytes) -> None:
    """Parse data; receive it from a socket that is closed after it: both have one outcome, and no fd stays open."""
    try:
        parsed = wire.parse(data)
    except wire.WireError:
        parsed = None
    free = _lowest_free()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        theirs.sendall(data)
        theirs.close()
        try:
            received = wire.receive(ours)
        except wire.WireError:
            received = None
        assert received == parsed
    assert _lowest_free() == free, "a file descriptor was left open"
    if parsed:
        assert not any("=" in name or "\0" in name + value for name, value in parsed.env.items())
        assert len(os.fsencode("".join(parsed.env))) + len(parsed.stdin) <= len(data)


def _lowest_free() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


TARGET = Target(run, words=("vmt1", "CNI_COMMAND=", "CNI_NETNS=", "DEL", "\0", "{}"), most_bytes=1 << 15)
