"""The API server, over HTTPS with the service account's token.

A client library for Kubernetes takes 28 MB of the agent's memory; this takes 2. Each call has a connection of its own,
as calls are rare, and reads token and certificate again, as the kubelet replaces them. Every call is bounded: its time,
and the bytes of its answer. stop() ends those in progress, as the end of the agent must not wait for a server.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from http import HTTPStatus
from urllib.parse import quote, urlencode

from cni.config import schema
from cni.dataclass import dataclass
from cni.errors import CniError, reason
from cni.spec import INVALID_NETWORK_CONFIG, IO_FAILURE, TRY_AGAIN_LATER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
RESOURCE = "/apis/resource.k8s.io/v1"
JSON = "application/json"
APPLY = "application/apply-patch+yaml"
_CONNECT_SECONDS = 3.0
_PAUSE_SECONDS = 0.5
_MOST = 8 << 20
"""Bytes of an answer. A ResourceSlice has 128 devices, and a page of them _PAGE slices: less than half of this."""
_PAGE = 16
_PIECE = 1 << 16
_LATER = (HTTPStatus.TOO_MANY_REQUESTS, *(each for each in HTTPStatus if each >= 500))


@dataclass(frozen=True)
class Answer:
    """An HTTP answer. body: the JSON object; {} if it is none."""

    status: int
    body: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the request was carried out."""
        return self.status < HTTPStatus.MULTIPLE_CHOICES

    def failed(self, what: str) -> CniError:
        """The error for an answer that is not ok. what: the object, for the message."""
        why = str(self.body.get("message") or http.client.responses.get(self.status, ""))
        if self.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            hint = "the API server refuses the agent; give its service account the rights of docs/dra.md"
            return CniError(IO_FAILURE, f"{what}: {hint}", why)
        code = TRY_AGAIN_LATER if self.status in _LATER else INVALID_NETWORK_CONFIG
        return CniError(code, f"{what}: the API server answered {self.status}", why)


class Api:
    """The server. Threads may share it.

    host, port: its address; account: the folder of token and ca.crt. seconds: for a call, with its repetitions.
    """

    def __init__(self, host: str, port: int, account: str = ACCOUNT, *, seconds: float = 20.0) -> None:
        self._host, self._port, self._account, self._seconds = host, port, account, seconds
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._lines: set[socket.socket] = set()
        """A duplicate of the socket of each call."""
        self._failed = 0
        """Connections that failed: where the host is a name, the next one is to its next address."""

    def stop(self) -> None:
        """Have all calls fail from now on, and those in progress at once."""
        with self._lock:
            self._stopped.set()
            for line in self._lines:
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

    def get(self, path: str, **query: str) -> Answer:
        """GET the path. Raises CniError 11."""
        return self.call("GET", path, query=query)

    def listed(self, path: str, **query: str) -> list[dict[str, Any]]:
        """The items of a list, read in pages. Raises CniError."""
        items: list[dict[str, Any]] = []
        query["limit"] = str(_PAGE)
        while True:
            answer = self.get(path, **query)
            if not answer.ok:
                raise answer.failed(path.rpartition("/")[2])
            items += answer.body.get("items") or ()
            query["continue"] = str((answer.body.get("metadata") or {}).get("continue") or "")
            if not query["continue"]:
                return items

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        kind: str = JSON,
        query: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request; it is repeated while the server cannot be reached or is overloaded. Raises CniError 11."""
        until = time.monotonic() + self._seconds
        target = f"{path}?{urlencode(query)}" if query else path
        while True:
            if self._stopped.is_set():
                raise CniError(TRY_AGAIN_LATER, "the agent is ending; try again")
            try:
                answer = self._once(method, target, None if body is None else json.dumps(body), kind, until)
                if answer.status not in _LATER or time.monotonic() + _PAUSE_SECONDS > until:
                    return answer
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() + _PAUSE_SECONDS > until or isinstance(error, ValueError):
                    raise CniError(
                        TRY_AGAIN_LATER,
                        f"the API server at {self._host}:{self._port} cannot be used; try again",
                        reason(error) or type(error).__name__,
                    ) from None
            self._stopped.wait(_PAUSE_SECONDS)

    def _once(self, method: str, target: str, body: str | None, kind: str, until: float) -> Answer:
        with open(f"{self._account}/token", encoding="ascii") as file:
            token = file.read().strip()
        context = ssl.create_default_context(cafile=f"{self._account}/ca.crt")
        connection = http.client.HTTPSConnection(self._host, self._port, context=context)
        headers = {"Authorization": f"Bearer {token}", "Accept": JSON}
        if body is not None:
            headers["Content-Type"] = kind
        with self._connected() as line:
            try:
                connection.sock = context.wrap_socket(line, server_hostname=self._host)
                connection.sock.settimeout(max(0.1, until - time.monotonic()))
                connection.request(method, target, body, headers)
                response = connection.getresponse()
                return Answer(response.status, _object(_read(response, until)))
            finally:
                connection.close()

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        """A TCP connection to the server, which stop() shuts down. Raises OSError."""
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[self._failed % len(found)]
        with socket.socket(family, kind, protocol) as line, line.dup() as duplicate:
            with self._lock:
                self._lines.add(duplicate)
            try:
                if self._stopped.is_set():  # stop() has not seen it
                    raise ConnectionAbortedError
                line.settimeout(_CONNECT_SECONDS)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    line.connect(address)
                except OSError:
                    self._failed += 1
                    raise
                yield line
            finally:
                with self._lock:
                    self._lines.remove(duplicate)


def segment(name: str) -> str:
    """A name as one segment of a path."""
    return quote(name, safe="")


def _read(response: http.client.HTTPResponse, until: float) -> bytes:
    """The whole body. Raises OSError if it takes too long, ValueError if it is too large."""
    data = bytearray()
    while piece := response.read1(_PIECE):
        data += piece
        if len(data) > _MOST:
            raise ValueError(f"its answer has more than {_MOST >> 20} MiB")
        if time.monotonic() > until:
            raise TimeoutError("its answer takes too long")
    return bytes(data)


def _object(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"its answer is not JSON: {schema.show(data[:100].decode(errors='replace'))}"
        ) from error
    return document if isinstance(document, dict) else {}
