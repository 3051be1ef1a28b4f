"""Hostile neighbours, each a process that goes on until it is killed.

    python -m lab.soak.neighbours linger|fds|slow BROKER_SOCKET         in a pod without an attachment
    python -m lab.soak.neighbours http PORT PORT                        on the node
    python -m lab.soak.neighbours config SHIM SEED                      in the runtime's place: a hostile network author

All of them pause between two attempts, because what they are to take is the agent's time and not the machine's. Each
prints a line for each attempt.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FDS = 253  # linux/net/scm.h: the most in one message
_KEPT = 96
"""Connections that are kept open: more than a server allows one client."""
_LIMIT = 1 << 20
"""The longest network config that the shim accepts, in bytes."""
_LINGER_SECONDS = 30


def _connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _attempts(seconds: float) -> Iterator[int]:
    """Numbers, with a pause between two; prints a line for each."""
    for number in itertools.count():
        yield number
        print(number, flush=True)
        time.sleep(seconds)


def linger(path: str) -> None:
    """Passes sockets whose last close(2) sleeps: with unsent data, SO_LINGER, and a peer that never reads."""
    readers: deque[socket.socket] = deque(maxlen=_KEPT)
    for _ in _attempts(0.2):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sender = socket.create_connection(listener.getsockname())
            readers.append(listener.accept()[0])
        sender.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sender.send(bytes(1 << 16))
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, _LINGER_SECONDS))
        with suppress(OSError), _connected(path) as connection:
            socket.send_fds(connection, [b"{}\n"], [sender.fileno()])
        threading.Thread(
            target=sender.close, daemon=True
        ).start()  # which sleeps if the agent has closed its own


def fds(path: str) -> None:
    """Passes as many fds as fit into one message, in as many messages as the broker's buffer takes."""
    null = os.open(os.devnull, os.O_RDONLY)
    for _ in _attempts(0.1):
        with suppress(OSError), _connected(path) as connection:
            connection.setblocking(False)
            while True:
                socket.send_fds(connection, [b" "], [null] * _FDS)


def slow(path: str) -> None:
    """Connections that send nothing or a byte a second, that are half closed, or that end in the middle."""
    held: deque[socket.socket] = deque(maxlen=_KEPT)
    for number in _attempts(0.1):
        with suppress(OSError):
            connection = _connected(path)
            held.append(connection)
            if number % 4 == 1:
                connection.shutdown(socket.SHUT_WR)
            elif number % 4 == 2:
                connection.sendall(b'{"ifnames"')
            elif number % 4 == 3:
                connection.close()
        for each in list(held)[::2]:
            with suppress(OSError):
                each.send(b" ")


def http(*ports: str) -> None:
    """TCP connections that stay idle, send a byte now and then, or a request whose answer they do not read."""
    held: deque[socket.socket] = deque(maxlen=_KEPT)
    for number in _attempts(0.05):
        with suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", int(ports[number % len(ports)])), 5)
            connection.setblocking(False)
            held.append(connection)
            if number % 8 == 3:
                connection.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            elif number % 8 == 5:
                connection.send(b"x" * 20_000)
        for each in itertools.islice(held, 0, None, 8):
            with suppress(OSError):
                each.send(b"G")


def documents() -> dict[str, bytes]:
    """Network configs of up to 1 MiB, by the kind of work that they make."""
    head = '{"cniVersion": "1.1.0", "name": "hostile", "type": "vmtap", "interface": "wire"'

    def full(piece: Callable[[int], str], end: str, begin: str = ", ") -> bytes:
        """The head, and so many pieces that the whole document is at the limit."""
        pieces, room = [], _LIMIT - len(head) - len(begin) - len(end) - 16
        for number in itertools.count():
            room -= len(each := piece(number)) + 1
            if room < 0:
                break
            pieces.append(each)
        return (head + begin + ",".join(pieces) + end).encode()

    return {
        "60 000 unknown keys": (
            head + "".join(f', "moode{number}": 1' for number in range(60_000)) + "}"
        ).encode(),
        "unknown keys, 1 MiB": full(lambda number: f'"k{number}":1', "}"),
        "one key again and again": full(lambda _: '"mode":"x"', "}"),
        "keys twice": full(lambda number: f'"k{number // 2}":1', "}"),
        "unknown keys below dns": full(lambda number: f'"k{number}":1', "}}", ', "dns": {'),
        "a long list": full(lambda _: '"1"', "]}}", ', "dns": {"nameservers": ['),
        "a long list of other types": full(lambda _: "1", "]}}", ', "dns": {"nameservers": ['),
        "versions": full(lambda number: f'"{number}"', "]}", ', "cniVersions": ['),
        "results": full(lambda _: "{}", "]}}", ', "prevResult": {"cniVersion": "1.1.0", "ips": ['),
        "attachments": full(lambda _: "{}", "]}", ', "cni.dev/valid-attachments": ['),
        "lists in lists": (head + ', "args": ' + "[" * (_LIMIT - 500)).encode(),
        "objects in objects": (head + ', "args": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}").encode(),
        "a long key": (head + ', "' + "m" * (_LIMIT - 500) + '": 1}').encode(),
        "a long text": (head + ', "mode": "' + r"\u001b" * (_LIMIT // 6 - 100) + '"}').encode(),
        "a long number": (head + ', "mtu": ' + "9" * (_LIMIT - 500) + "}").encode(),
    }


def config(shim: str, seed: str) -> None:
    """ADDs with such documents, one after the other, each with its DEL."""
    choose = random.Random(f"config {seed}")  # noqa: S311 - to be repeated
    every = list(documents().values())
    known = b'{"cniVersion": "1.1.0", "name": "hostile", "type": "vmtap", "interface": "wire"}'
    for number in _attempts(0.3):
        for command, document in (("ADD", choose.choice(every)), ("DEL", known)):
            env = {**os.environ, "CNI_COMMAND": command, "CNI_CONTAINERID": f"hostile-{number}"}
            subprocess.run([shim], input=document, env=env, capture_output=True, check=False)


if __name__ == "__main__":
    programs: dict[str, Callable[..., None]] = {
        each.__name__: each for each in (linger, fds, slow, http, config)
    }
    programs[sys.argv[1]](*sys.argv[2:])
