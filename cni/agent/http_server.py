"""An HTTP server of pages without parameters (GET and HEAD), which no client can hold up.

Owned by the project because http.server costs the agent 7 MB and 60 ms (it loads email and OpenSSL), and has a thread
for each client. Here one thread serves all connections, none of which it waits for: each has _SECONDS in all and a head
of _HEAD_LIMIT bytes, and the oldest idle one is dropped when there are too many, of one address or of all. So an idle
connection costs other clients nothing, and a client that sends its head at once is served. Must not change anything, or
read a body.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from logging import DEBUG, ERROR

from cni.agent.bucket import Bucket
from cni.agent.log import log
from cni.dataclass import dataclass, field
from cni.errors import CniError, reason
from cni.spec import INVALID_NETWORK_CONFIG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Page = Callable[[], "Answer"]

_SECONDS = 5.0
"""From accept(2) to the end of the answer."""
_HEAD_LIMIT = 8192
_MOST = 64
_PER_ADDRESS = 16
"""Connections at a time: of all clients, and of one IPv4 address or IPv6 /64."""
_PAGE_BURST, _PAGE_RATE = 20, 2.0
"""How often a page is computed: at once, and a second from then on. In between, clients get the last answer."""
_ACCEPTS = 8
"""Connections that are accepted before the others have their turn."""
_PAUSE_SECONDS = 0.1
"""Until the next try, if accept(2) fails."""
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, section 2.5.5.2


@dataclass(frozen=True)
class Answer:
    """The answer of a page."""

    status: HTTPStatus
    kind: str
    """Its media type."""
    body: bytes


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    address: bytes
    until: float
    head: bytearray = field(default_factory=bytearray)
    unsent: memoryview | None = None
    """None before the answer; empty when it is sent, and the client is to close the connection."""


class HttpServer:
    """Serves pages, by path, on address (HOST:PORT) until stop(). Raises CniError 7 if it cannot listen there.

    setting: the field of the agent's file that has the address.
    """

    def __init__(self, address: str, pages: Mapping[str, Page], *, setting: str) -> None:
        self._pages = pages
        self._listener = _listen(address, setting)
        self._listener.setblocking(False)
        self._buckets = {path: Bucket(_PAGE_BURST, _PAGE_RATE) for path in pages}
        self._last: dict[str, Answer] = {}
        self._connections: dict[int, _Connection] = {}
        """By fd; the oldest first."""
        self._paused_until: float | None = None
        self._errors = Bucket(1, 0.1)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=setting, daemon=True)

    @property
    def port(self) -> int:
        """The port that it listens on: the kernel's choice if the address has port 0."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Accept no more, and close all connections."""
        self._stopping = True
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(_SECONDS)
        self._listener.close()

    def _run(self) -> None:
        with select.epoll() as poll:
            self._poll = poll
            poll.register(self._listener, select.EPOLLIN)
            while not self._stopping:
                for fd, _ in poll.poll(self._patience()):
                    if fd == self._listener.fileno():
                        self._accept()
                    elif connection := self._connections.get(fd):  # else dropped by an earlier event
                        self._advance(connection)
                self._expire()
            for connection in list(self._connections.values()):
                self._drop(connection)

    def _patience(self) -> float | None:
        """Seconds until a connection's deadline or the end of a pause; None without either."""
        times = [each.until for each in self._connections.values()]
        if self._paused_until is not None:
            times.append(self._paused_until)
        return max(0.0, min(times) - time.monotonic()) + 0.001 if times else None

    def _expire(self) -> None:
        now = time.monotonic()
        for each in [each for each in self._connections.values() if each.until <= now]:
            self._drop(each)
        if self._paused_until is not None and self._paused_until <= now:
            self._paused_until = None
            self._poll.modify(self._listener, select.EPOLLIN)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                accepted, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._pause(error)
                return
            accepted.setblocking(False)
            connection = _Connection(accepted, _group(address[0]), time.monotonic() + _SECONDS)
            self._make_room(connection.address)
            self._connections[accepted.fileno()] = connection
            self._poll.register(accepted, select.EPOLLIN)
            self._advance(connection)

    def _pause(self, error: OSError) -> None:
        """After an error of accept(2), for example EMFILE: the listener stays readable, and polling it would spin."""
        if self._stopping:
            return
        if self._errors.take():
            log(ERROR, "an HTTP connection cannot be accepted", error=reason(error))
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        self._poll.modify(self._listener, 0)

    def _make_room(self, address: bytes) -> None:
        """Drop a connection of the address, or of all, if there are too many.

        The oldest that has its answer, else the oldest without a complete request, else the oldest.
        """
        everyone = list(self._connections.values())
        same = [each for each in everyone if each.address == address]
        crowd = same if len(same) >= _PER_ADDRESS else everyone if len(everyone) >= _MOST else []
        if crowd:
            self._drop(min(crowd, key=lambda each: 1 if each.unsent is None else 2 * bool(each.unsent)))

    def _advance(self, connection: _Connection) -> None:
        """Read and send as far as that does not block."""
        try:
            if connection.unsent is None and self._read(connection):
                connection.unsent = memoryview(self._answer(bytes(connection.head)))
                self._poll.modify(connection.socket, select.EPOLLOUT)
            if connection.unsent:
                connection.unsent = connection.unsent[connection.socket.send(connection.unsent) :]
                if not connection.unsent:
                    # To close with bytes unread would reset the connection, and the client would lose the answer.
                    connection.socket.shutdown(socket.SHUT_WR)
                    self._poll.modify(connection.socket, select.EPOLLIN)
            elif connection.unsent is not None and not connection.socket.recv(_HEAD_LIMIT):
                self._drop(connection)
        except BlockingIOError:
            return
        except OSError:  # the client has gone
            self._drop(connection)
        except Exception as error:  # the thread must serve other clients
            log(ERROR, "an HTTP request failed", error=repr(error))
            self._drop(connection)

    def _read(self, connection: _Connection) -> bool:
        """Read some of the head; whether it is complete, or longer than it may be."""
        got = connection.socket.recv(_HEAD_LIMIT + 1 - len(connection.head))
        if not got:
            raise ConnectionError("the client sent no request")
        connection.head += got
        return b"\r\n\r\n" in connection.head or len(connection.head) > _HEAD_LIMIT

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.socket.fileno()]
        connection.socket.close()

    def _answer(self, head: bytes) -> bytes:
        """The answer to a request's head: status line, headers and body."""
        method, path = _request_line(head)
        if b"\r\n\r\n" not in head:
            answer = _error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head is too long")
        elif not method:
            answer = _error(HTTPStatus.BAD_REQUEST, "not an HTTP/1 request")
        elif method not in ("GET", "HEAD"):
            answer = _error(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD")
        elif path in self._pages:
            if self._buckets[path].take() or path not in self._last:
                self._last[path] = self._pages[path]()
            answer = self._last[path]
        else:
            answer = _error(HTTPStatus.NOT_FOUND, f"there is {', '.join(self._pages)}")
        log(DEBUG, "HTTP request", method=method[:10], status=answer.status.value)
        headers = (
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
            f"Content-Type: {answer.kind}\r\n"
            f"Content-Length: {len(answer.body)}\r\n"
            "Cache-Control: no-store\r\n"
            + ("Allow: GET, HEAD\r\n" if answer.status is HTTPStatus.METHOD_NOT_ALLOWED else "")
            + "Connection: close\r\n\r\n"
        )
        return headers.encode() + (b"" if method == "HEAD" else answer.body)


def _error(status: HTTPStatus, why: str) -> Answer:
    return Answer(status, "application/json", f'{{"error": "{why}"}}\n'.encode())


def _request_line(head: bytes) -> tuple[str, str]:
    """(method, path without its query); two empty strings if it is not an HTTP/1 request."""
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[0].isalpha() or not words[2].startswith("HTTP/1."):
        return "", ""
    return words[0], words[1].partition("?")[0]


def _group(host: str) -> bytes:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 address."""
    with suppress(OSError):
        return socket.inet_pton(socket.AF_INET, host)
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return packed[12:] if packed.startswith(_MAPPED) else packed[:8]


def _listen(address: str, setting: str) -> socket.socket:
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
            f'{setting} {address!r}: cannot listen there; set another, or "" for none',
            reason(error),
        ) from error
