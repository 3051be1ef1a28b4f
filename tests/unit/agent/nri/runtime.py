"""A runtime's side of NRI, by hand: accepts plugins, calls them, and sends what no runtime sends."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from cni.agent.nri import nri_pb2 as api
from cni.agent.nri.connection import PLUGIN, REQUEST, RESPONSE, RUNTIME
from lab.process import Closing
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    from google.protobuf.message import Message

FRAME = struct.Struct(">II")
HEADER = struct.Struct(">IIBB")
PLUGINS = "nri.pkg.api.v1alpha1.Plugin"


class Runtime(Closing):
    """Listens at path; accept() is a plugin's connection."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(LIMIT)
        self._listener.bind(str(path))
        self._listener.listen()

    def accept(self) -> Plugin:
        """The next plugin that connects."""
        connection, _ = self._listener.accept()
        connection.settimeout(LIMIT)
        return Plugin(connection)

    def close(self) -> None:
        self._listener.close()


class Plugin(Closing):
    """One connection of a plugin."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._stream = 1
        self._unread = {PLUGIN: b"", RUNTIME: b""}

    def frame(self, channel: int, data: bytes) -> None:
        """Send one frame."""
        self.socket.sendall(FRAME.pack(channel, len(data)) + data)

    def read(self, channel: int) -> tuple[int, int, bytes]:
        """The next message of a channel: stream, kind, data."""
        while True:
            unread = self._unread[channel]
            if len(unread) >= HEADER.size:
                length, stream, kind, _ = HEADER.unpack_from(unread)
                end = HEADER.size + length
                if len(unread) >= end:
                    self._unread[channel] = unread[end:]
                    return stream, kind, unread[HEADER.size : end]
            number, length = FRAME.unpack(self._exactly(FRAME.size))
            assert length <= 4096
            self._unread[number] += self._exactly(length)

    def registered(self, error: str = "") -> api.RegisterPluginRequest:
        """Answer the plugin's registration."""
        stream, kind, data = self.read(RUNTIME)
        request = api.Request.FromString(data)
        assert (stream, kind) == (1, REQUEST)
        assert (request.service, request.method) == ("nri.pkg.api.v1alpha1.Runtime", "RegisterPlugin")
        answer = api.Response(status=api.Status(code=2, message=error) if error else None)
        self._send(RUNTIME, 1, RESPONSE, answer)
        return api.RegisterPluginRequest.FromString(request.payload)

    def connected(self, pods: list[api.PodSandbox] | None = None, wait: int = 60_000) -> int:
        """Register, configure and synchronize; the events that the plugin subscribes to."""
        self.registered()
        done = self.call("Configure", api.ConfigureRequest(runtime_name="lab", request_timeout=wait))
        answer = self.call("Synchronize", api.SynchronizeRequest(pods=pods or []))
        assert not answer.status.code
        return api.ConfigureResponse.FromString(done.payload).events

    def call(self, method: str, request: Message | bytes, service: str = PLUGINS) -> api.Response:
        """Call the plugin."""
        stream = self.begin(method, request, service)
        answered, kind, data = self.read(PLUGIN)
        assert (answered, kind) == (stream, RESPONSE)
        return api.Response.FromString(data)

    def begin(self, method: str, request: Message | bytes, service: str = PLUGINS) -> int:
        """Send a call without a look at the answer; its stream."""
        stream, self._stream = self._stream, self._stream + 2
        payload = request if isinstance(request, bytes) else request.SerializeToString()
        self._send(PLUGIN, stream, REQUEST, api.Request(service=service, method=method, payload=payload))
        return stream

    def ended(self) -> bool:
        """Waits until the plugin has closed the connection."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()

    def _send(self, channel: int, stream: int, kind: int, message: Message) -> None:
        data = message.SerializeToString()
        whole = HEADER.pack(len(data), stream, kind, 0) + data
        for at in range(0, len(whole), 4096):
            self.frame(channel, whole[at : at + 4096])

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            got = self.socket.recv(length - len(data))
            assert got, "the plugin closed the connection"
            data += got
        return data
