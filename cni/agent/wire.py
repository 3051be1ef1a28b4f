"""What the shim and the agent say to each other; cni/shim/vmtap.c is the other end, and has the layout.

Must not know what a request means.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from functools import partial

from cni.lock import nothing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    from cni.plugin import Response

    T = TypeVar("T")

_HEAD = struct.Struct("=IIII")  # magic, called as macvtap?, length of env, length of stdin
_TAIL = struct.Struct("=iII")  # exit status, length of stdout, length of stderr
_MAGIC = 0x31746D76  # "vmt1"
ENV_LIMIT = 16 << 20
STDIN_LIMIT = (1 << 20) + 1


class WireError(ValueError):
    """Bytes that no shim of ours sends."""


@dataclass(frozen=True)
class Asked:
    """One request as the shim sent it. netns: an O_PATH fd that the receiver closes, or None."""

    called_as: str
    env: Mapping[str, str]
    stdin: bytes
    netns: int | None


def receive(connection: socket.socket, late: Callable[[], None] = nothing) -> Asked | None:
    """The next request; None if the peer said nothing. late: called at a timeout, after which it is tried once more.

    Raises WireError, OSError (with it TimeoutError).
    """
    first, fds, _, _ = _twice(lambda: socket.recv_fds(connection, _HEAD.size, 1), late)
    netns = fds[0] if fds else None
    try:
        if not first and netns is None:
            return None
        head = first + _exactly(connection, _HEAD.size - len(first), late)
        body_length = _check(head)
        return _asked(head, _exactly(connection, body_length, late), netns)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def parse(data: bytes) -> Asked:
    """A request that the shim left in a file. Raises WireError."""
    if len(data) < _HEAD.size or len(data) - _HEAD.size != _check(data[: _HEAD.size]):
        raise WireError("it is cut short")
    return _asked(data[: _HEAD.size], data[_HEAD.size :], None)


def reply(connection: socket.socket, response: Response, stderr: bytes) -> None:
    """Answer and be done. Raises OSError if the shim is gone."""
    connection.sendall(
        _TAIL.pack(response.status, len(response.stdout), len(stderr)) + response.stdout + stderr
    )


def _twice(read: Callable[[], T], late: Callable[[], None]) -> T:
    try:
        return read()
    except TimeoutError:
        late()
        return read()


def _check(head: bytes) -> int:
    magic, _, env_length, stdin_length = _HEAD.unpack(head)
    if magic != _MAGIC or env_length > ENV_LIMIT or stdin_length > STDIN_LIMIT:
        raise WireError("it does not begin as a request")
    return int(env_length + stdin_length)


def _asked(head: bytes, body: bytes, netns: int | None) -> Asked:
    _, as_macvtap, env_length, _ = _HEAD.unpack(head)
    env: dict[str, str] = {}
    for entry in body[:env_length].split(b"\0")[:-1]:
        name, _, value = entry.decode(errors="surrogateescape").partition("=")
        env.setdefault(name, value)
    return Asked("macvtap" if as_macvtap else "vmtap", env, body[env_length:], netns)


def _exactly(connection: socket.socket, length: int, late: Callable[[], None]) -> bytes:
    data = bytearray(length)
    view, have = memoryview(data), 0
    while have < length:
        got = _twice(partial(connection.recv_into, view[have:]), late)
        if not got:
            raise WireError("it ended too early")
        have += got
    return bytes(data)
