"""The agent's log, when nobody reads it: requests are answered, and the log tells what it lacks."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab.wire import NIC
from tests.agent.conftest import Agent
from tests.agent.test_metrics import parse
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab

REFUSED = 3000
"""Log lines: more than the pipe and the agent's queue have room for."""


@pytest.fixture
def agent(lab: Lab, tmp_path: Path) -> Iterator[Agent]:
    flags = ("--metrics", "127.0.0.1:0")
    made = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", flags).start()
    yield made
    if made.process:
        made.end()


def _fill(agent: Agent) -> None:
    """Fills the pipe of the agent's stderr, with lines."""
    assert agent.process
    pipe = os.open(f"/proc/{agent.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while os.write(pipe, b"full\n" * 100):
            pass
    with suppress(BlockingIOError):
        while os.write(pipe, b"\n"):
            pass
    os.close(pipe)


def _refused(agent: Agent) -> None:
    """A connection that the agent refuses, which it logs."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(agent.run / "agent" / "cni.sock"))
        connection.sendall(bytes(16))
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            connection.recv(1)


def test_requests_are_answered_while_nobody_reads_the_log(agent: Agent, lab: Lab) -> None:
    _fill(agent)
    pod, conf, shim = lab.pod(), config(source=NIC), agent.shim()
    for number in range(3):
        shim("ADD", conf, netns=pod, container="c1", ifname=f"net{number}").ok()
    for _ in range(REFUSED):
        _refused(agent)
    shim("ADD", conf, netns=pod, container="c1", ifname="late").ok()
    dropped = parse(agent.get("/metrics")[2])["vmtap_log_lines_dropped_total", ()]
    assert dropped > 0

    assert agent.wait_for("log lines were dropped")["lines"] == dropped
    logged = [line for line in agent.log if line["msg"] in ("refused", "request")]
    assert len(logged) + dropped == REFUSED + 4
    assert [line["ifname"] for line in logged if line["msg"] == "request"] == ["net0", "net1", "net2"]
    shim("DEL", conf, netns=pod, container="c1", ifname="late").ok()
    assert agent.wait_for("request")["ifname"] == "late"
    assert agent.end() == 0
    assert sum(line["msg"] == "log lines were dropped" for line in agent.log) == 1


def test_the_log_is_whole_at_the_end(agent: Agent) -> None:
    for _ in range(300):
        _refused(agent)
    assert agent.end(signal.SIGTERM) == 0
    assert sum(line["msg"] == "refused" for line in agent.log) == 300


def test_an_agent_ends_while_nobody_reads_the_log(agent: Agent) -> None:
    _fill(agent)
    assert agent.process
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(60) == 0
