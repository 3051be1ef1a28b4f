"""The fd broker against pods that want to stop it: from inside a pod, as a process without any privilege."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni import spec
from cni.agent.admission import BURST, PER_POD
from cni.agent.holders import MOST
from tests.agent.conftest import Agent
from tests.agent.test_broker import Client, asking, attach, refused
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab

OLDER_KERNEL = """
import runpy, sys
from cni.agent import sent_fds
sent_fds.SO_PASSRIGHTS = 4242
sys.argv = sys.argv[3:]
runpy.run_module("cni.agent", run_name="__main__", alter_sys=True)
"""
"""Runs the agent with an option number that this kernel does not know, as kernels before 6.16 do not know 83."""

LINGER = """
import json, socket, struct, sys, threading
kept = []
def lingering():
    listener = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(listener.getsockname())
    receiver, _ = listener.accept()
    sender.setblocking(False)
    try:
        while True:
            sender.send(bytes(65536))
    except BlockingIOError:
        pass
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    kept.append(receiver)  # which never reads
    return sender
for line in sys.stdin:
    asked, sent = json.loads(line), 0
    for _ in range(asked["number"]):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(sys.argv[1])
        if asked.get("greeted"):
            connection.recv(4096)
        sender = lingering()
        try:
            socket.send_fds(connection, [asked.get("say", "").encode() or b"x"], [sender.fileno()])
            sent += 1
        except OSError:  # refused by the kernel, or by the agent already
            pass
        threading.Thread(target=sender.close, daemon=True).start()  # which sleeps if it is the last to close
        kept.append(connection)
    print(json.dumps(sent), flush=True)
"""
"""Sends sockets whose close(2) takes an hour. Says how many the kernel let it send."""


@pytest.fixture(params=["this kernel", "older kernel"])
def agent(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Iterator[Agent]:
    older = request.param == "older kernel"
    made = Agent(
        lab.node,
        tmp_path / "run",
        tmp_path / "interfaces.yaml",
        flags=("--metrics", "127.0.0.1:0", "--health", "127.0.0.1:0"),
        prefix=(sys.executable, "-c", OLDER_KERNEL) if older else (),
    )
    yield made.start()
    if made.process:
        made.end()


def ends_at_once(agent: Agent) -> None:
    """Within less than the linger time: watched() would kill it."""
    assert agent.end() == 0


@pytest.mark.parametrize("greeted", [False, True], ids=["before it is accepted", "with the request"])
def test_fds_whose_close_sleeps_stop_nobody(agent: Agent, lab: Lab, greeted: bool) -> None:
    pod, other = lab.pod(), lab.pod("other")
    attach(agent, pod)
    attach(agent, other, container="c2")
    assert agent.process
    with Client(agent, pod, LINGER) as hostile, asking(agent, other) as client:
        client.ask(nothing=True)
        tasks = Path(f"/proc/{agent.process.pid}/task")
        before = len(list(tasks.iterdir()))
        if greeted:
            hostile.ask(number=3, greeted=True, say="{}\n")
        else:
            with agent.stopped():  # so that the fds arrive before the connection is accepted
                hostile.ask(number=PER_POD + BURST)
        assert client.ask()[0]["fds"] == 1
        assert agent.get("/healthz")[0] == 200
        until(lambda: len(list(tasks.iterdir())) <= before, "threads sleep")
        ends_at_once(agent)


def test_fds_that_wait_in_the_backlog_do_not_stop_the_end(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    with Client(agent, pod, LINGER) as hostile:
        hostile.ask(number=1)
        with agent.stopped() as process:
            hostile.ask(number=40)
            process.send_signal(signal.SIGTERM)
        ends_at_once(agent)


def test_a_pod_that_connects_all_the_time_is_refused_and_others_are_not(agent: Agent, lab: Lab) -> None:
    pod, other = lab.pod(), lab.pod("other")
    attach(agent, pod)
    attach(agent, other, container="c2")
    flood = """
import json, socket, sys
sys.stdin.readline()
said = {}
for _ in range(2000):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        code = json.loads(connection.recv(4096)).get("error", {}).get("code", 0)
        said[code] = said.get(code, 0) + 1
print(json.dumps(said), flush=True)
sys.stdin.readline()
"""
    with Client(agent, pod, flood) as hostile, asking(agent, other) as client:
        answer = hostile.tell({})
        for _ in range(5):
            assert client.ask(open=False)[0]["fds"] == 0
        said = answer()
        assert said[str(spec.TRY_AGAIN_LATER)] > 1000, said
        assert client.ask()[0]["fds"] == 1
    agent.end()
    lines = [line for line in agent.log if line["msg"] == "launcher refused"]
    assert 0 < len(lines) < 40


def test_one_pod_does_not_use_up_the_log_of_another(agent: Agent, lab: Lab) -> None:
    pod, other = lab.pod(), lab.pod("other")
    attach(agent, pod)
    attach(agent, other, container="c2")
    with asking(agent, pod) as hostile, asking(agent, other) as client:
        for _ in range(30):
            hostile.ask(ifnames=["net7"])
        refused(client.ask(ifnames=["net9"]), spec.NO_ATTACHMENT, "there is net1")
        line = agent.wait_for("launcher refused")
        while "net9" not in line["error"]:
            line = agent.wait_for("launcher refused")


def test_a_peer_that_has_ended_stops_nobody(agent: Agent, lab: Lab) -> None:
    pod, other = lab.pod(), lab.pod("other")
    attach(agent, other, container="c2")
    gone = """
import os, socket, sys
sys.stdin.readline()
for _ in range(100):
    if os.fork() == 0:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(sys.argv[1])
        os._exit(0)
    os.wait()
print("true", flush=True)
sys.stdin.readline()
"""
    assert agent.process
    tasks = Path(f"/proc/{agent.process.pid}/task")
    with Client(agent, pod, gone) as hostile, asking(agent, other) as client:
        assert client.ask(open=False)
        before = len(list(tasks.iterdir()))
        assert hostile.ask() is True
        assert client.ask()[0]["fds"] == 1
        until(lambda: len(list(tasks.iterdir())) <= before, "threads are left")


def test_a_byte_at_a_time_has_the_deadline_of_all(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod)
    drip = """
import json, socket, sys, time
sys.stdin.readline()
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.recv(4096)
try:
    while True:
        connection.send(b" ")
        time.sleep(0.5)
except OSError:
    pass
print(json.dumps(json.loads(connection.recv(4096))["error"]), flush=True)
"""
    with Client(agent, pod, drip) as slow:
        assert "not finished" in slow.ask()["msg"]


def test_the_links_of_a_pod_are_not_listed(lab: Lab, tmp_path: Path) -> None:
    """Python holds the interpreter's lock while it lists them: 60 ms for 3000 links, and a pod may have more."""
    without = "import socket\ndel socket.if_nameindex" + OLDER_KERNEL
    prefix = (sys.executable, "-c", without)
    agent = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", prefix=prefix).start()
    try:
        pod = lab.pod()
        attach(agent, pod)
        with asking(agent, pod) as client:
            assert client.ask()[0]["fds"] == 1
    finally:
        agent.end()


def test_holders_of_an_attachment_are_bounded(agent: Agent, lab: Lab) -> None:
    """Each costs the agent a pidfd for as long as it lives."""
    pod = lab.pod()
    attach(agent, pod)
    forks = """
import json, os, sys, time
from cni.errors import CniError
from cni.launcher import broker_client
asked = json.loads(sys.stdin.readline())
codes = []
for _ in range(asked["number"]):
    read, write = os.pipe()
    if os.fork() == 0:
        while True:
            try:
                broker_client.ask(sys.argv[1], ifnames=[], queues=None, shared=True, open=True)
                code = 0
            except CniError as error:
                code = error.code
            if code != 11:
                break
            time.sleep(0.1)
        os.write(write, bytes([code]))
        os.close(write)
        sys.stdin.read()
        os._exit(0)
    os.close(write)
    codes.append(os.read(read, 1)[0])
print(json.dumps(codes), flush=True)
sys.stdin.read()
"""
    with Client(agent, pod, forks) as client:
        codes = client.ask(number=MOST + 2)
        assert codes == [0] * MOST + [spec.DEVICE_BUSY] * 2
        assert client.process.stdin
        client.process.stdin.close()
        client.process.stdin = None
        client.process.wait(LIMIT)
