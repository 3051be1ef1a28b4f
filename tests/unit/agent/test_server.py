"""The server's end, where a peer that waits cannot be had of a real shim at will."""

from __future__ import annotations

import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TYPE_CHECKING

import pytest

from cni.agent.server import Server, listen
from cni.plugin import Response
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cni.agent.server import Reply
    from cni.attach.call import Request

TAIL = struct.calcsize("=iII")
REQUEST = struct.pack("=IIII", 0x31746D76, 0, 0, 0)


def _connected(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(LIMIT)
    try:
        peer.connect(str(path))
    except OSError:
        peer.close()
        raise
    return peer


@pytest.mark.parametrize("waits", [False, True])
def test_who_has_connected_when_it_stops_is_served(tmp_path: Path, waits: bool) -> None:
    """Also those whom nobody has accepted yet. Who comes later is refused at once, and finds the next agent."""
    path = tmp_path / "cni.sock"
    begun, go = threading.Event(), threading.Event()

    def answer(_: Request, reply: Reply, leave: Callable[[], None]) -> None:
        begun.set()
        assert go.wait(LIMIT)
        if waits:
            leave()
        reply(Response(b"", 0), b"")

    faults: list[str] = []
    server = Server(listen(str(path)), answer, faults.append)
    server.start()
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        peers = [stack.enter_context(_connected(path)) for _ in range(5)]
        for peer in peers:
            peer.sendall(REQUEST)
        assert begun.wait(LIMIT)
        stopped = pool.submit(server.stop, LIMIT)
        with pytest.raises(ConnectionRefusedError):
            while True:  # until it has heard that it is to stop
                _connected(path).close()
                time.sleep(0.05)  # those that wait must not fill the backlog
        go.set()
        assert stopped.result()
        assert [len(peer.recv(TAIL)) for peer in peers] == [TAIL] * 5
    assert faults == []


def test_whether_another_one_waits_is_reported(tmp_path: Path) -> None:
    """After each connection, and by the thread that takes over from a request that waits for long."""
    path = tmp_path / "cni.sock"
    begun, go = threading.Event(), [threading.Event(), threading.Event()]
    reports: SimpleQueue[bool] = SimpleQueue()

    def answer(_: Request, reply: Reply, leave: Callable[[], None]) -> None:
        begun.set()
        if len(go) == 1:
            leave()
        assert go.pop(0).wait(LIMIT)
        reply(Response(b"", 0), b"")

    first, second = go
    server = Server(listen(str(path)), answer, lambda _: None, reports.put)
    server.start()
    assert not reports.get(timeout=LIMIT)
    with _connected(path) as one:
        one.sendall(REQUEST)
        assert begun.wait(LIMIT)
        with _connected(path) as other:
            other.sendall(REQUEST)
            first.set()
            assert reports.get(timeout=LIMIT), "after the first one, the other one waits"
            assert not reports.get(timeout=LIMIT), "nobody waits while the other one waits for its delegate"
            second.set()
            assert not reports.get(timeout=LIMIT)
            assert len(other.recv(TAIL)) == TAIL
    assert server.stop(LIMIT)
