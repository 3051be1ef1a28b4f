"""The agent's side of the protocol between shim and agent; cni/shim/vmtap.c is the other side and documents the layout.

Must not know what a request means.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from functools import partial

from cni.attach.call import Request
from cni.state.lock import keep_turn

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import TypeVar

    from cni.plugin import Response

    T = TypeVar("T")

_HEAD = struct.Struct("=IIII")  # magic, called as, length of env, length of stdin
_TAIL = struct.Struct("=iII")  # exit status, length of stdout, length of stderr
_MAGIC = 0x31746D76  # "vmt1"
HOOK = "vmtap-hook"
"""The shim's name as a container's hook: Request.called_as."""
_NAMES = ("vmtap", "macvtap", HOOK)
_FIRST_BYTES = 1 << 14
"""Read by the first call: nearly every request is smaller."""
_PROMPT_SECONDS = 0.05
"""How long to wait for the rest of a request before late() is called. A shim sends its request at once."""
_ONE_FD = socket.CMSG_LEN(4)
ENV_LIMIT = 1 << 20
_MOST_VARIABLES = 1 << 13
STDIN_LIMIT = (1 << 20) + 1


class WireError(ValueError):
    """The data is not a request of the shim."""


def receive(connection: _socket.socket, late: Callable[[], None] | None = None) -> Request | None:
    """The next request, from a blocking socket; None if the peer sent nothing. The caller closes the request's netns.

    late: called if the peer is slow (_PROMPT_SECONDS); sets the timeout of later reads. Without late: no timeout.
    Raises WireError, OSError (TimeoutError is one).
    """
    first, fds = _arrived(connection) or _slow(connection, late)
    netns = fds[0] if fds else None
    try:
        if not first and netns is None:
            return None
        if len(first) < _HEAD.size:
            first += _exactly(connection, _HEAD.size - len(first), late)
        head, body = first[: _HEAD.size], first[_HEAD.size :]
        missing = _check(head) - len(body)
        if missing < 0:
            raise WireError("the request is longer than its head states")
        return _request(head, body + _exactly(connection, missing, late) if missing else body, netns)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def parse(data: bytes) -> Request:
    """Parse a request that the shim wrote to a file in pending/. Raises WireError."""
    if len(data) < _HEAD.size or len(data) - _HEAD.size != _check(data[: _HEAD.size]):
        raise WireError("the request does not have the length that its head states")
    return _request(data[: _HEAD.size], data[_HEAD.size :], None)


def reply(
    connection: _socket.socket, response: Response, stderr: bytes, late: Callable[[], None] = keep_turn
) -> None:
    """Send the answer. late: called if that blocks until the shim reads. Raises OSError if the shim has ended."""
    data = _TAIL.pack(response.status, len(response.stdout), len(stderr)) + response.stdout + stderr
    sent = 0
    with suppress(BlockingIOError):
        sent = connection.send(data, socket.MSG_DONTWAIT)
    if sent < len(data):
        late()
        connection.sendall(data[sent:])


def _arrived(connection: _socket.socket) -> tuple[bytes, list[int]] | None:
    """_first() if the request has arrived, as nearly always: saves setting a timeout, and poll(2). Otherwise None."""
    for _ in range(2):
        try:
            return _first(connection, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # connect(2) has woken this thread on the shim's own processor, before the shim could send: let it.
            os.sched_yield()
    return None


def _slow(connection: _socket.socket, late: Callable[[], None] | None) -> tuple[bytes, list[int]]:
    """_first() of a peer that has not sent yet."""
    if late:
        connection.settimeout(_PROMPT_SECONDS)
    return _twice(lambda: _first(connection), late)


def _first(connection: _socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """The data of one recvmsg(2), and its fds: at most one, since the kernel closes those without room."""
    data, ancillary, _, _ = connection.recvmsg(_FIRST_BYTES, _ONE_FD, flags | socket.MSG_CMSG_CLOEXEC)
    return data, [
        struct.unpack("=i", payload)[0]
        for level, kind, payload in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    ]


def _twice(read: Callable[[], T], late: Callable[[], None] | None) -> T:
    try:
        return read()
    except TimeoutError:
        if late is None:
            raise
        late()
        return read()


def _check(head: bytes) -> int:
    magic, called_as, env_length, stdin_length = _HEAD.unpack(head)
    if magic != _MAGIC or called_as >= len(_NAMES) or env_length > ENV_LIMIT or stdin_length > STDIN_LIMIT:
        raise WireError("the head is not that of a request")
    return int(env_length + stdin_length)


def _request(head: bytes, body: bytes, netns: int | None) -> Request:
    _, called_as, env_length, _ = _HEAD.unpack(head)
    env: dict[str, str] = {}
    if body.count(b"\0", 0, env_length) > _MOST_VARIABLES:
        raise WireError(f"the environment has more than {_MOST_VARIABLES} variables")
    for entry in body[:env_length].split(b"\0")[:-1]:
        name, _, value = entry.decode(errors="surrogateescape").partition("=")
        env.setdefault(name, value)
    return Request(env, body[env_length:], _NAMES[called_as], netns)


def _exactly(connection: _socket.socket, length: int, late: Callable[[], None] | None) -> bytes:
    if late:
        connection.settimeout(_PROMPT_SECONDS)
    data = bytearray(length)
    view, have = memoryview(data), 0
    while have < length:
        got = _twice(partial(connection.recv_into, view[have:]), late)
        if not got:
            raise WireError("the connection ended within the request")
        have += got
    return bytes(data)
