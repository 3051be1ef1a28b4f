"""health.py and http_server.py: alive, ready, and a server that no client can hold up."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import socket
import threading
import time
from contextlib import ExitStack, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest

from cni.agent import broker as broker_module
from cni.agent import health, http_server
from cni.agent.broker import Broker
from cni.agent.http_server import Answer, HttpServer
from cni.agent.metrics import Registry
from cni.errors import CniError
from tests.agent.conftest import Agent
from tests.runner import config
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.wire import Lab


@pytest.fixture
def agent(lab: Lab, tmp_path: Path) -> Iterator[Agent]:
    made = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", flags=("--health", "127.0.0.1:0"))
    yield made.start()
    if made.process:
        made.end()


def _reasons(agent: Agent, path: str, *, mute: bool = False) -> dict[str, str]:
    """{} for a 200. mute: nobody answers at its socket; else it is asked again if it was too slow for itself."""

    def in_time(answer: tuple[int, str, str]) -> bool:
        return mute or "timed out" not in json.loads(answer[2])["reasons"].get("socket", "")

    status, kind, body = until(lambda: agent.get(path), "it is too slow for itself", in_time)
    document = json.loads(body)
    assert kind == "application/json"
    assert status == (200 if document["ok"] else 503)
    assert document["ok"] == (not document["reasons"])
    reasons: dict[str, str] = document["reasons"]
    return reasons


def test_it_is_alive_and_ready(agent: Agent) -> None:
    assert _reasons(agent, "/healthz") == _reasons(agent, "/readyz") == {}
    agent.end()
    assert not [line for line in agent.log if line["level"] in ("warning", "error")]


def test_the_socket_is_gone(agent: Agent) -> None:
    (agent.run / "agent/cni.sock").unlink()
    assert _reasons(agent, "/healthz").keys() == {"socket"}
    assert _reasons(agent, "/readyz").keys() == {"socket"}


def test_the_socket_is_somebody_elses_who_does_not_answer(agent: Agent) -> None:
    path = agent.run / "agent/cni.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        mute.bind(str(path))
        mute.listen()
        assert "timed out" in _reasons(agent, "/healthz", mute=True)["socket"]


def test_a_bad_policy_is_not_ready_and_alive(agent: Agent) -> None:
    agent.policy.write_text("interfaces: 7")
    assert _reasons(agent, "/readyz").keys() == {"policy"}
    assert _reasons(agent, "/healthz") == {}
    agent.policy.write_text("allowUnlisted: true")
    assert _reasons(agent, "/readyz") == {}
    agent.policy.unlink()
    assert "does not exist" in _reasons(agent, "/readyz")["policy"]
    assert _reasons(agent, "/healthz") == {}


def test_state_that_cannot_be_written(agent: Agent) -> None:
    shutil.rmtree(agent.run / "attachments")
    (agent.run / "attachments").touch()
    assert _reasons(agent, "/readyz").keys() == {"state"}
    assert _reasons(agent, "/healthz") == {}


def test_a_port_that_is_taken_keeps_no_pod_from_starting(lab: Lab, tmp_path: Path) -> None:
    def take() -> socket.socket:
        return socket.create_server(("127.0.0.1", 9999))

    with lab.node.call(take):
        agent = Agent(lab.node, tmp_path / "run", tmp_path / "p", flags=("--health", "127.0.0.1:9999"))
        agent.start()
        agent.shim()("ADD", config(source="eth1", mode="vepa"), netns=lab.pod()).ok()
        agent.end()
    assert "cannot listen there" in "".join(str(line.get("error")) for line in agent.log)


def test_the_brokers_socket_is_gone(agent: Agent) -> None:
    (agent.run / "launcher/broker.sock").unlink()
    assert _reasons(agent, "/healthz").keys() == {"broker"}


def test_a_broker_that_is_stuck_or_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "holders").mkdir()
    broker = Broker(str(tmp_path), Registry())
    go_on, entered = threading.Event(), threading.Event()

    def stuck(connection: socket.socket) -> None:
        with connection:
            entered.set()
            go_on.wait(LIMIT)

    monkeypatch.setattr(broker, "_admit", stuck)
    monkeypatch.setattr(broker_module, "_STUCK_SECONDS", 0.0)
    broker.start()
    assert broker.stuck() is None
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(broker.path)
        entered.wait(LIMIT)
        assert "busy with one" in str(until(broker.stuck, "it is not reported"))
        go_on.set()
        until(lambda: broker.stuck() is None, "it is reported still")
    monkeypatch.setattr(broker, "_acceptor", threading.Thread())  # one that is not alive
    assert broker.stuck() == "the thread that accepts launchers has ended"
    monkeypatch.undo()
    broker.stop()
    assert broker.stuck() is None  # it ends as it should


def test_metrics_have_an_address_of_their_own(agent: Agent) -> None:
    agent.end()
    agent.flags += ("--metrics", "127.0.0.1:0")
    agent.start()
    assert agent.get("/metrics")[0] == 200
    assert agent.get("/healthz")[0] == 200

    def at_metrics() -> bytes:
        return _ask_port(agent.port, b"GET /healthz HTTP/1.1\r\n\r\n")

    assert agent.node.call(at_metrics).split()[1] == b"404"


@pytest.fixture
def served() -> Iterator[HttpServer]:
    """A server in this process; its one check fails in a way of its own each."""

    def refused() -> str | None:
        raise CniError(5, "no room")

    def broken() -> str | None:
        raise OSError("broken")

    checks = {"good": lambda: None, "bad": lambda: "it is bad", "refused": refused, "broken": broken}
    made = HttpServer(
        "127.0.0.1:0",
        {
            "/healthz": health.page({}),
            "/readyz": health.page(checks),
            "/metrics": lambda: Answer(HTTPStatus.OK, "text/plain", b"x 1\n" * 1_000_000),
        },
        setting="health",
    )
    made.start()
    yield made
    made.stop()


def _ask_port(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connection:
        connection.sendall(request)
        answer = b""
        while got := connection.recv(65536):
            answer += got
        return answer


def _ask(served: HttpServer, request: bytes) -> bytes:
    return _ask_port(served.port, request)


def _alive(served: HttpServer) -> bool:
    return _ask(served, b"GET /healthz HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_reasons_are_listed(served: HttpServer) -> None:
    head, body = _ask(served, b"GET /readyz?verbose HTTP/1.1\r\nHost: x\r\n\r\n").split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert json.loads(body)["reasons"] == {"bad": "it is bad", "refused": "no room", "broken": "broken"}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.0\r\n\r\n", b"200"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/2\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 20000, b"431"),
    ],
)
def test_requests_good_and_bad(served: HttpServer, request_: bytes, status: bytes) -> None:
    assert _ask(served, request_).split(b" ")[1] == status
    assert _alive(served)


def test_a_client_that_has_ended_its_side_gets_all_of_a_long_answer(served: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while got := connection.recv(1 << 20):
            answer += got
    assert len(answer.partition(b"\r\n\r\n")[2]) == 4_000_000


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"],
    ids=["nothing", "half a head", "a request whose answer is not read"],
)
def test_idle_clients_delay_nobody(served: HttpServer, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """More than it has room for: the oldest are dropped, long before their deadline."""
    monkeypatch.setattr(http_server, "_SECONDS", float(LIMIT))
    with ExitStack() as stack:
        idle = []
        for _ in range(100):
            client = socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT)
            idle.append(stack.enter_context(client))
            client.sendall(sent)
        assert _alive(served)
        assert len(served._connections) <= http_server._PER_ADDRESS
        with suppress(ConnectionResetError):
            while idle[0].recv(1 << 20):
                pass
        assert _alive(served)


def test_a_client_that_has_its_answer_is_dropped_before_one_that_has_not(served: HttpServer) -> None:
    with ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT))

        waiting = connect()
        for _ in range(50):  # none of them closes
            answered = connect()
            answered.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert answered.recv(15) == b"HTTP/1.1 200 OK"
        waiting.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert waiting.recv(15) == b"HTTP/1.1 200 OK"


def test_a_client_that_is_slow_is_hung_up_on(served: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it sends a byte now and then: the deadline is that of the whole request."""
    monkeypatch.setattr(http_server, "_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) as slow:

        def gone() -> bool:
            try:
                slow.send(b"G")
                slow.settimeout(0.01)
                return not slow.recv(1)
            except TimeoutError:
                return False
            except OSError:
                return True

        until(gone, "it is not hung up on")
    assert _alive(served)
    until(lambda: not served._connections, "a connection is left")


def test_one_address_does_not_displace_another(served: HttpServer) -> None:
    with ExitStack() as stack:
        other = socket.create_connection(("127.0.0.1", served.port), LIMIT, source_address=("127.0.0.2", 0))
        stack.enter_context(other)
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT))
        assert _alive(served)
        other.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert other.recv(15) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ECONNABORTED, errno.ENOBUFS, errno.ENOMEM])
def test_an_error_of_accept_ends_nothing_and_does_not_spin(served: HttpServer, number: int) -> None:
    calls = 0

    class Failing:
        def __init__(self, listener: socket.socket) -> None:
            self._listener = listener

        def accept(self) -> object:
            nonlocal calls
            calls += 1
            if calls <= 3:
                raise OSError(number, os.strerror(number))
            return self._listener.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(self._listener, name)

    served._listener = Failing(served._listener)  # type: ignore[assignment]
    begin = time.thread_time()
    assert _alive(served)
    assert calls <= 6
    assert time.thread_time() >= begin


def test_it_goes_on_when_there_are_fds_again(agent: Agent) -> None:
    """A real EMFILE."""
    assert agent.process
    files = resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{agent.process.pid}/fd"))
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (used + 1, files[1]))

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", agent._port("health")), timeout=LIMIT)

    with ExitStack() as stack:
        for _ in range(8):  # a free number below the highest may take some
            stack.enter_context(agent.node.call(connect))
        assert "accept" in agent.wait_for("an HTTP connection cannot be accepted")["msg"]
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, files)
        assert _reasons(agent, "/healthz") == {}


def test_a_page_is_not_computed_for_each_of_many_requests() -> None:
    computed = 0

    def page() -> Answer:
        nonlocal computed
        computed += 1
        return Answer(HTTPStatus.OK, "text/plain", b"")

    made = HttpServer("127.0.0.1:0", {"/healthz": page}, setting="health")
    made.start()
    try:
        assert all(_alive(made) for _ in range(200))
        assert computed < 100
    finally:
        made.stop()


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "no.such.host.invalid:1"])
def test_an_address_that_cannot_be_had(address: str) -> None:
    with pytest.raises(CniError, match=r"health.*cannot listen there"):
        HttpServer(address, {}, setting="health")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("fd00::1", "fd00::2:0:0:1", True),
        ("fd00::1", "fd00:0:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
    ],
)
def test_what_counts_as_one_address(first: str, second: str, same: bool) -> None:
    assert (http_server._group(first) == http_server._group(second)) == same


@pytest.mark.parametrize(("address", "to"), [(":0", "127.0.0.1"), ("[::1]:0", "::1")])
def test_addresses(lab: Lab, address: str, to: str) -> None:
    """In a namespace with both versions of IP."""

    def ask() -> bytes:
        made = HttpServer(address, {"/healthz": health.page({})}, setting="health")
        made.start()
        try:
            with socket.create_connection((to, made.port), timeout=LIMIT) as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
                return connection.recv(15)
        finally:
            made.stop()

    assert lab.pod().call(ask) == b"HTTP/1.1 200 OK"
