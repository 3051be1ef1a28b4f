"""api.py: over TLS, with bounded time and memory, whatever the server does."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cni.agent.dra import api as module
from cni.agent.dra.api import APPLY, Api
from cni.errors import CniError
from cni.spec import INVALID_NETWORK_CONFIG, IO_FAILURE, TRY_AGAIN_LATER
from tests.waiting import LIMIT, until


class Server(ThreadingHTTPServer):
    """Answers each request with what reply() returns: (status, body)."""

    def __init__(self, cert: Path) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.reply: Callable[[], tuple[int, bytes]] = lambda: (200, b'{"kind": "X"}')
        super().__init__(("127.0.0.1", 0), _Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, cert.with_name("key.pem"))
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that breaks off is what some tests want."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        status, answer = self.server.reply()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=api"]
    subprocess.run(
        [*words, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "ca.crt"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (folder / "token").write_text("secret\n")
    return folder / "ca.crt"


@pytest.fixture
def server(certificate: Path) -> Iterator[Server]:
    with Server(certificate) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def api(server: Server, certificate: Path) -> Api:
    return Api("127.0.0.1", server.server_address[1], str(certificate.parent), seconds=2)


def test_a_call(server: Server, api: Api) -> None:
    answer = api.call("PATCH", "/a/b", {"c": 1}, kind=APPLY, query={"force": "true", "x": "a b"})
    assert (answer.ok, answer.body) == (True, {"kind": "X"})
    [(method, path, headers, body)] = server.seen
    assert (method, path, json.loads(body)) == ("PATCH", "/a/b?force=true&x=a+b", {"c": 1})
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/apply-patch+yaml"


@pytest.mark.parametrize("where", ["refused", "connect", "handshake", "answer"])
def test_stop_ends_a_call_wherever_it_is(
    server: Server, certificate: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No limit of time ends it here."""
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 1e6)
    reached, over = threading.Event(), threading.Event()

    def answer() -> tuple[int, bytes]:
        reached.set()
        over.wait(LIMIT)
        return 200, b"{}"

    server.reply = answer
    errors: list[CniError] = []

    def call() -> None:
        with pytest.raises(CniError) as raised:
            client.get("/")
        errors.append(raised.value)

    with ExitStack() as stack:
        stack.callback(over.set)
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = silent.getsockname()[1]
        if where == "connect":  # the queue of connections is full: a SYN is dropped
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        elif where == "answer":
            port = server.server_address[1]
        elif where == "refused":
            silent.close()
        client = Api("127.0.0.1", port, str(certificate.parent), seconds=1e6)
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        if where == "answer":
            assert reached.wait(LIMIT)
        elif where != "refused":
            state = "02" if where == "connect" else "01"  # SYN_SENT, ESTABLISHED
            until(lambda: _states(port) == {state}, "the client is not there")
        client.stop()
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert [error.code for error in errors] == [TRY_AGAIN_LATER]
    with pytest.raises(CniError, match="is ending"):
        client.get("/")


def _states(port: int) -> set[str]:
    """The states of the sockets that this process alone has connected to the port (proc(5), net/tcp)."""
    with open("/proc/net/tcp", encoding="ascii") as file:
        lines = [line.split() for line in file][1:]
    newest = [each[3] for each in lines if each[2] == f"0100007F:{port:04X}"]
    return set(newest) - ({"01"} if "02" in newest else set())


def test_a_token_that_the_kubelet_replaces(server: Server, api: Api, certificate: Path) -> None:
    api.get("/")
    certificate.with_name("token").write_text("newer")
    api.get("/")
    certificate.with_name("token").write_text("secret\n")
    assert [headers["Authorization"] for _, _, headers, _ in server.seen] == ["Bearer secret", "Bearer newer"]


def test_a_list_in_pages(server: Server, api: Api) -> None:
    pages = iter([b'{"items": [{"a": 1}], "metadata": {"continue": "next"}}', b'{"items": [{"a": 2}]}'])
    server.reply = lambda: (200, next(pages))
    assert api.listed("/things", fieldSelector="x=y") == [{"a": 1}, {"a": 2}]
    assert "continue=next" in server.seen[1][1]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, INVALID_NETWORK_CONFIG, "the API server answered 404"),
        (403, IO_FAILURE, "give its service account the rights of docs/dra.md"),
        (401, IO_FAILURE, "rights"),
        (422, INVALID_NETWORK_CONFIG, "because"),
    ],
)
def test_refusals(server: Server, api: Api, status: int, code: int, words: str) -> None:
    server.reply = lambda: (status, b'{"message": "because"}')
    error = api.get("/").failed("slice x")
    assert error.code == code
    assert words in str(error)
    assert len(server.seen) == 1


def test_an_overloaded_server_is_asked_again(server: Server, api: Api) -> None:
    answers = iter([(503, b"{}"), (429, b"{}"), (200, b"{}")])
    server.reply = lambda: next(answers)
    assert api.get("/").ok
    server.reply = lambda: (500, b"{}")
    assert api.get("/").failed("x").code == TRY_AGAIN_LATER


@pytest.mark.parametrize("body", [b"", b"<html>", b"[" * 100_000, b"\xff"])
def test_an_answer_that_is_not_json(server: Server, api: Api, body: bytes) -> None:
    server.reply = lambda: (200, body)
    with pytest.raises(CniError, match="is not JSON"):
        api.get("/")
    server.reply = lambda: (200, b"[1]")
    assert api.get("/").body == {}


def test_an_answer_without_end(server: Server, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 1000)
    server.reply = lambda: (200, b" " * 100_000)
    with pytest.raises(CniError, match="has more than"):
        api.get("/")


def test_a_server_that_says_nothing(certificate: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        quiet = Api("127.0.0.1", silent.getsockname()[1], str(certificate.parent), seconds=0.1)
        with pytest.raises(CniError, match="cannot be used") as refused:
            quiet.get("/")
        assert refused.value.code == TRY_AGAIN_LATER


def test_another_server_gets_no_token(server: Server, certificate: Path, tmp_path: Path) -> None:
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=other"]
    subprocess.run([*words, "-keyout", "k", "-out", "ca.crt"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "token").write_text("secret")
    for account in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CniError, match="cannot be used"):
            Api("127.0.0.1", server.server_address[1], str(account), seconds=0.1).get("/")
    assert server.seen == []
