"""health.py: alive, ready, and a server that nobody can hold up or make believe."""

from __future__ import annotations

import json
import shutil
import socket
from typing import TYPE_CHECKING

import pytest

from cni.agent import health
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
    made = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", flags=("--metrics", "127.0.0.1:0"))
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
    agent.policy.unlink()
    assert _reasons(agent, "/readyz") == {}


def test_state_that_cannot_be_written(agent: Agent) -> None:
    shutil.rmtree(agent.run / "attachments")
    (agent.run / "attachments").touch()
    assert _reasons(agent, "/readyz").keys() == {"state"}
    assert _reasons(agent, "/healthz") == {}


def test_a_port_that_is_taken_keeps_no_pod_from_starting(lab: Lab, tmp_path: Path) -> None:
    def take() -> socket.socket:
        return socket.create_server(("127.0.0.1", 9999))

    with lab.node.call(take):
        agent = Agent(lab.node, tmp_path / "run", tmp_path / "p", flags=("--metrics", "127.0.0.1:9999"))
        agent.start()
        agent.shim()("ADD", config(source="eth1", mode="vepa"), netns=lab.pod()).ok()
        agent.end()
    assert "cannot listen there" in "".join(str(line.get("error")) for line in agent.log)


@pytest.fixture
def served() -> Iterator[health.Health]:
    """A server in this process; its one check fails in a way of its own each."""

    def refused() -> str | None:
        raise CniError(5, "no room")

    def broken() -> str | None:
        raise OSError("broken")

    made = health.Health(
        "127.0.0.1:0",
        live={},
        ready={"good": lambda: None, "bad": lambda: "it is bad", "refused": refused, "broken": broken},
        metrics=lambda: b"x 1\n",
        content_type="text/plain",
    )
    made.start()
    yield made
    made.stop()


def _ask(served: health.Health, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) as connection:
        connection.sendall(request)
        answer = b""
        while got := connection.recv(65536):
            answer += got
        return answer


def test_reasons_are_listed(served: health.Health) -> None:
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
def test_requests_good_and_bad(served: health.Health, request_: bytes, status: bytes) -> None:
    assert _ask(served, request_).split(b" ")[1] == status
    assert _ask(served, b"GET /healthz HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_one_who_says_nothing_is_hung_up_on(served: health.Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_SECONDS", 0.3)
    mute = [socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT) for _ in range(8)]
    try:
        for each in mute:
            each.sendall(b"GET /met")
        assert b" 200 " in _ask(served, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert [each.recv(10) for each in mute] == [b""] * 8
    finally:
        for each in mute:
            each.close()


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "no.such.host.invalid:1"])
def test_an_address_that_cannot_be_had(address: str) -> None:
    with pytest.raises(CniError, match="cannot listen there"):
        health.Health(address, live={}, ready={}, metrics=bytes, content_type="")


@pytest.mark.parametrize(("address", "to"), [(":0", "127.0.0.1"), ("[::1]:0", "::1")])
def test_addresses(lab: Lab, address: str, to: str) -> None:
    """In a namespace with both versions of IP."""

    def ask() -> bytes:
        made = health.Health(address, live={}, ready={}, metrics=bytes, content_type="")
        made.start()
        try:
            with socket.create_connection((to, made.port), timeout=LIMIT) as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
                return connection.recv(15)
        finally:
            made.stop()

    assert lab.pod().call(ask) == b"HTTP/1.1 200 OK"
