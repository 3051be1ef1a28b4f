"""Messages of ttrpc in frames of NRI's multiplexer, over one unix socket.

A frame is the number of a channel and a length, both 32 bits big endian, and so many bytes. On one channel the runtime
calls the plugin, on the other the plugin calls the runtime. A message is a header of 10 bytes and its data, and may
take several frames. Sources: nri, pkg/net/multiplex; ttrpc, PROTOCOL.md. Must not know what a message means.
"""

from __future__ import annotations

import socket
import struct
import threading

from cni.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PLUGIN = 1
"""The channel on which the runtime calls the plugin."""
RUNTIME = 2
"""The channel on which the plugin calls the runtime."""
REQUEST = 1
RESPONSE = 2

MOST = 4 << 20
"""Bytes of a message's data at most (ttrpc, channel.go, messageLengthMax)."""
_FRAME = struct.Struct(">II")  # channel, length
_HEADER = struct.Struct(">IIBB")  # length, stream, kind, flags
_SENT = 4096
"""Bytes of a frame that is sent at most: the runtime's reader has no more room, and ends the connection."""
_SEND = struct.pack("ll", 5, 0)  # struct timeval
"""How long a send may take: a runtime that does not read must not stop the agent."""


class ProtocolError(Exception):
    """The runtime sent something that is no frame or message, or closed the connection."""


@dataclass(frozen=True)
class Message:
    """One message of ttrpc. kind: REQUEST or RESPONSE; stream: the number that a request and its response share."""

    channel: int
    stream: int
    kind: int
    data: bytes


class Connection:
    """A connection to the runtime's socket at path; a context manager. Raises OSError if there is no runtime.

    One thread may receive while another one sends or calls shut().
    """

    def __init__(self, path: str) -> None:
        self._unread = {PLUGIN: bytearray(), RUNTIME: bytearray()}
        self._sending = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND)
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def shut(self) -> None:
        """End the connection for both sides: a receive() that waits raises."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended
            return

    def limit(self, seconds: float | None) -> None:
        """How long each read may take from now on; None: without limit."""
        whole = int(seconds or 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", whole, 0))

    def send(self, message: Message) -> None:
        """Send a message. Raises OSError."""
        data = _HEADER.pack(len(message.data), message.stream, message.kind, 0) + message.data
        frames = (data[at : at + _SENT] for at in range(0, len(data), _SENT))
        with self._sending:
            for frame in frames:
                self._socket.sendall(_FRAME.pack(message.channel, len(frame)) + frame)

    def receive(self) -> Iterator[Message]:
        """The messages as they arrive. Ends by raising ProtocolError or OSError."""
        while True:
            channel, length = _FRAME.unpack(self._exactly(_FRAME.size))
            if length > MOST + _HEADER.size:
                raise ProtocolError(f"the runtime sent a frame of {length} bytes")
            data = self._exactly(length)
            unread = self._unread.get(channel)
            if unread is None:
                continue
            unread += data
            yield from messages(channel, unread)

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        view, have = memoryview(data), 0
        while have < length:
            got = self._socket.recv_into(view[have:])
            if not got:
                raise ProtocolError("the runtime closed the connection")
            have += got
        return data


def messages(channel: int, unread: bytearray) -> Iterator[Message]:
    """Take the whole messages from the beginning of what is unread. Raises ProtocolError if one is too long."""
    while len(unread) >= _HEADER.size:
        length, stream, kind, _ = _HEADER.unpack_from(unread)
        if length > MOST:
            raise ProtocolError(f"the runtime sent a message of {length} bytes")
        end = _HEADER.size + length
        if len(unread) < end:
            return
        data = bytes(unread[_HEADER.size : end])
        del unread[:end]
        yield Message(channel, stream, kind, data)
