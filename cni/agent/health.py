"""Serves /metrics, /healthz and /readyz over HTTP to every client that reaches the address; read-only.

Owned by the project because http.server costs the agent 7 MB and 60 ms (it loads email and OpenSSL), and a GET with a
deadline is all that is needed. Must not change anything, or read a body.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from logging import DEBUG

from cni.agent.log import log
from cni.errors import CniError
from cni.spec import INVALID_NETWORK_CONFIG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Check = Callable[[], str | None]

_THREADS = 4
"""Requests served at once; others wait in the backlog."""
_SECONDS = 5.0
"""From accept(2) to the end of the answer."""
_HEAD_LIMIT = 8192
_PROBE_SECONDS = 2.0
"""How long served() waits for an answer on the CNI socket."""
JSON = "application/json"


class Health:
    """Serves on address until stop(). Raises CniError 7 if it cannot listen there.

    live, ready: name → check, which returns why it fails, or None; metrics: returns the text, of type content_type.
    """

    def __init__(
        self,
        address: str,
        *,
        live: Mapping[str, Check],
        ready: Mapping[str, Check],
        metrics: Callable[[], bytes],
        content_type: str,
    ) -> None:
        self._live, self._ready = live, ready
        self._metrics, self._content_type = metrics, content_type
        self._listener = _listen(address)
        self._threads = [
            threading.Thread(target=self._serve, name="health", daemon=True) for _ in range(_THREADS)
        ]

    @property
    def port(self) -> int:
        """The port that it listens on: the kernel's choice if the address has port 0."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Accept no more, and wait for the requests in flight."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes every accept()
        for thread in self._threads:
            thread.join(_SECONDS)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # stop() was called
            with connection, suppress(OSError):
                self._handle(connection)

    def _handle(self, connection: socket.socket) -> None:
        until = time.monotonic() + _SECONDS
        head = bytearray()
        while b"\r\n\r\n" not in head:
            connection.settimeout(max(0.001, until - time.monotonic()))
            got = connection.recv(_HEAD_LIMIT)
            if not got:
                return
            head += got
            if len(head) > _HEAD_LIMIT:
                self._answer(
                    connection, "", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, {"error": "too long"}
                )
                return
        method, path = _request_line(bytes(head))
        connection.settimeout(max(0.001, until - time.monotonic()))
        if not method:
            self._answer(connection, method, HTTPStatus.BAD_REQUEST, {"error": "not an HTTP/1 request"})
        elif method not in ("GET", "HEAD"):
            self._answer(connection, method, HTTPStatus.METHOD_NOT_ALLOWED, {"error": "only GET and HEAD"})
        elif path == "/metrics":
            self._answer(connection, method, HTTPStatus.OK, self._metrics())
        elif path in ("/healthz", "/readyz"):
            why = _reasons(self._live if path == "/healthz" else self._ready)
            status = HTTPStatus.SERVICE_UNAVAILABLE if why else HTTPStatus.OK
            self._answer(connection, method, status, {"ok": not why, "reasons": why})
        else:
            self._answer(
                connection,
                method,
                HTTPStatus.NOT_FOUND,
                {"error": "there are /metrics, /healthz and /readyz"},
            )

    def _answer(
        self, connection: socket.socket, method: str, status: HTTPStatus, content: bytes | dict[str, object]
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n"
        kind = self._content_type if isinstance(content, bytes) else JSON
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            f"Content-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Cache-Control: no-store\r\n"
            + ("Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else "")
            + "Connection: close\r\n\r\n"
        )
        connection.sendall(head.encode() + (b"" if method == "HEAD" else body))
        # To close with bytes unread would reset the connection, and the client would lose the answer.
        connection.shutdown(socket.SHUT_WR)
        log(DEBUG, "health", method=method, status=status.value)


def served(path: str) -> str | None:
    """Why the unix socket at path is not served; None if a thread of the agent accepts and closes a connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(path)
            probe.shutdown(socket.SHUT_WR)  # the server closes a connection without a request
            probe.recv(1)
        except OSError as error:
            return f"{path}: {error}"
    return None


def _reasons(checks: Mapping[str, Check]) -> dict[str, str]:
    found = {}
    for name, check in checks.items():
        try:
            why = check()
        except (CniError, OSError) as error:
            why = str(error)
        if why:
            found[name] = why
    return found


def _request_line(head: bytes) -> tuple[str, str]:
    """(method, path without its query); two empty strings if it is not an HTTP/1 request."""
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[0].isalpha() or not words[2].startswith("HTTP/1."):
        return "", ""
    return words[0], words[1].partition("?")[0]


def _listen(address: str) -> socket.socket:
    """A listening socket for HOST:PORT. SO_REUSEPORT: an agent shares the address with the one that it replaces.

    Raises CniError 7 if the address is invalid or in use.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if int(port) > 0xFFFF:
            raise OverflowError("a port is at most 65535")
        if host:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, int(port)), family=family, reuse_port=True)
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, reuse_port=True
            )
        return socket.create_server(("", int(port)), reuse_port=True)
    except (OSError, OverflowError) as error:
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f'metrics {address!r}: cannot listen there; set another, or "" for none',
            str(error),
        ) from error
