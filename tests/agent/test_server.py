"""The agent as a server: many at once, nobody waits for another's delegate, a clean end, a policy that changes."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.agent.conftest import Agent
from tests.fakeipam import FakeIpam
from tests.runner import config
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from lab.wire import Lab

WIRE = {"source": "eth1", "mode": "bridge"}


@pytest.fixture
def slow(tmp_path: Path) -> FakeIpam:
    """Which a test has wait."""
    return FakeIpam(tmp_path / "bin")


def test_a_hundred_at_once(agent: Agent, lab: Lab) -> None:
    pods, shim = [lab.pod() for _ in range(20)], agent.shim()

    def life(number: int) -> int:
        pod, ifname = pods[number % 20], f"net{number // 20}"
        answer = shim("ADD", config(**WIRE), netns=pod, container=f"c{number}", ifname=ifname).ok()
        assert answer["interfaces"][0]["name"] == ifname
        return number

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(life, range(100))) == list(range(100))
        indexes = {link["ifindex"] for pod in pods for name, link in pod.links().items() if name != "lo"}
        assert len(indexes) == 100

        def end(number: int) -> None:
            shim(
                "DEL",
                config(**WIRE),
                netns=pods[number % 20],
                container=f"c{number}",
                ifname=f"net{number // 20}",
            ).ok()

        list(pool.map(end, range(100)))
    assert all(pod.links().keys() == {"lo"} for pod in pods)
    assert shim.leftovers() == []


def test_slow_delegates_delay_only_their_own(agent: Agent, lab: Lab, slow: FakeIpam, tmp_path: Path) -> None:
    """More of them than there are idle threads, and each waits until it is let go on."""
    slow.write(ADD=f'echo > "{tmp_path}/begun"; cat "{tmp_path}/$CNI_CONTAINERID"')
    os.mkfifo(tmp_path / "begun")
    shim, pods, names = (
        agent.shim(),
        [lab.pod() for _ in range(13)],
        [f"slow{number}" for number in range(12)],
    )
    for name in names:
        os.mkfifo(tmp_path / name)
    begun = os.open(tmp_path / "begun", os.O_RDWR)
    with ThreadPoolExecutor(12) as pool:
        slow_config = config(**WIRE, ipam=slow.config)
        waiting = [
            pool.submit(
                shim, "ADD", slow_config, netns=pod, container=name, env={"CNI_PATH": str(slow.folder)}
            )
            for pod, name in zip(pods, names, strict=False)
        ]
        seen = 0
        while seen < 12:
            seen += len(os.read(begun, 1))
        os.close(begun)
        shim("ADD", config(**WIRE), netns=pods[12], container="quick").ok()
        shim("DEL", config(**WIRE), netns=pods[12], container="quick").ok()
        assert not any(each.done() for each in waiting)
        for name in names:
            (tmp_path / name).write_text('{"ips": [{"address": "10.1.0.9/24"}]}')
        for each in waiting:
            assert each.result().ok()["ips"]


def test_who_waits_for_a_lock_delays_only_himself(
    agent: Agent, lab: Lab, slow: FakeIpam, tmp_path: Path
) -> None:
    slow.write(ADD=f'echo > "{tmp_path}/begun"; cat "{tmp_path}/go"')
    for name in ("begun", "go"):
        os.mkfifo(tmp_path / name)
    pod, other, shim = lab.pod(), lab.pod(), agent.shim()
    slow_config, env = config(**WIRE, ipam=slow.config), {"CNI_PATH": str(slow.folder)}
    with ThreadPoolExecutor(4) as pool:
        adding = pool.submit(shim, "ADD", slow_config, netns=pod, container="held", env=env)
        (tmp_path / "begun").read_bytes()
        ending = [
            pool.submit(shim, "DEL", slow_config, netns=pod, container="held", env=env) for _ in range(3)
        ]
        for _ in range(5):
            shim("ADD", config(**WIRE), netns=other, container="quick").ok()
            shim("DEL", config(**WIRE), netns=other, container="quick").ok()
        assert not any(each.done() for each in (adding, *ending))
        (tmp_path / "go").write_text('{"ips": [{"address": "10.1.0.9/24"}]}')
        adding.result().ok()
        for each in ending:
            each.result().ok()
    assert "net1" not in pod.links()


@pytest.mark.parametrize(
    "sent",
    [b"", b"vm", struct.pack("=IIII", 0x31746D76, 0, 1000, 1000) + b"CNI_COMMAND=ADD"],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_peer_that_does_not_go_on_delays_nobody(agent: Agent, lab: Lab, sent: bytes) -> None:
    pod, shim = lab.pod(), agent.shim()
    with ExitStack() as stack:
        for _ in range(10):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            peer.connect(str(agent.run / "agent/cni.sock"))
            peer.sendall(sent)
        shim("ADD", config(**WIRE), netns=pod, env={"VMTAP_DEADLINE": "50"}).ok()  # each may take 15
        shim("DEL", config(**WIRE), netns=pod, env={"VMTAP_DEADLINE": "50"}).ok()


def test_a_request_whose_peer_has_ended_is_dropped(agent: Agent, lab: Lab, slow: FakeIpam) -> None:
    """Nothing is made for an ADD that nobody waits for any more. A peer that is there gets its answer."""
    slow.write()
    pod, shim = lab.pod(), agent.shim()
    variables = shim.environment("ADD", pod) | {"CNI_PATH": str(slow.folder)}
    env = b"".join(f"{name}={value}\0".encode() for name, value in variables.items())
    stdin = json.dumps(config(**WIRE, ipam=slow.config)).encode()
    # The request waits for its turn.
    with agent.stopped(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(agent.run / "agent/cni.sock"))
        peer.sendall(struct.pack("=IIII", 0x31746D76, 0, len(env), len(stdin)) + env + stdin)
    assert "has ended before its request" in agent.wait_for("refused")["why"]
    assert slow.log() == []
    shim("ADD", json.loads(stdin), netns=pod, env={"CNI_PATH": str(slow.folder)}).ok()
    assert slow.log() == ["ADD c1 net1"]


def test_sigterm_finishes_what_is_in_flight(agent: Agent, lab: Lab, slow: FakeIpam, tmp_path: Path) -> None:
    slow.write(ADD=f'echo > "{tmp_path}/begun"; sleep 1; answer')
    pod, shim = lab.pod(), agent.shim()
    os.mkfifo(tmp_path / "begun")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            shim, "ADD", config(**WIRE, ipam=slow.config), netns=pod, env={"CNI_PATH": str(slow.folder)}
        )
        (tmp_path / "begun").read_bytes()
        assert agent.end() == 0
        assert answer.result().ok()["ips"][0]["address"] == "10.9.0.5/24"
    assert "net1" in pod.links()


def test_sigterm_does_not_wait_for_ever(lab: Lab, slow: FakeIpam, tmp_path: Path) -> None:
    agent = Agent(lab.node, tmp_path / "run", tmp_path / "x", flags=("--drain-seconds", "1")).start()
    slow.write(ADD=f'exec 2>&-; echo > "{tmp_path}/begun"; exec cat "{tmp_path}/go"')  # stderr is the agent's
    for name in ("begun", "go"):
        os.mkfifo(tmp_path / name)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            agent.shim(wait=0),
            "ADD",
            config(**WIRE, ipam=slow.config),
            netns=lab.pod(),
            env={"CNI_PATH": str(slow.folder)},
        )
        (tmp_path / "begun").read_bytes()
        assert agent.end() == 0
        answer.result().error(11)
        os.close(os.open(tmp_path / "go", os.O_RDWR))  # the delegate ends


def test_a_policy_is_read_again_and_a_bad_one_is_not_taken(agent: Agent, lab: Lab) -> None:
    pod, shim = lab.pod(), agent.shim()

    def attach(**fields: str) -> int:
        answer = shim("ADD", config(**fields), netns=pod)
        shim("DEL", config(), netns=pod).ok()
        return 0 if answer.status == 0 else int(answer.document["code"])

    assert attach(**WIRE) == 0
    agent.policy.write_text("interfaces: [{name: lan, source: {dev: eth1}, modes: [vepa]}]")
    agent.policy.chmod(0o644)
    assert attach(**WIRE) == 7
    assert attach(interface="lan", mode="vepa") == 0
    agent.policy.write_text("interfaces: [{name: lan, sauce: {dev: eth1}}]")
    assert attach(interface="lan", mode="vepa") == 0
    assert agent.wait_for("the policy file is refused; the last good one stays")["error"].count("source")
    agent.policy.unlink()
    assert attach(interface="lan", mode="vepa") == 0
    assert attach(**WIRE) == 7
    agent.policy.write_text("allowUnlisted: true")
    assert attach(**WIRE) == 0


def test_a_policy_that_was_never_good_closes(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "interfaces.yaml").write_text("interfaces: 7")
    agent = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml").start()
    agent.shim()("ADD", config(**WIRE), netns=lab.pod()).error(7)
    agent.end()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"x",
        b"GET / HTTP/1.0\r\n\r\n",
        struct.pack("=IIII", 0x31746D76, 0, 0xFFFFFFFF, 0),
        bytes(16),
        os.urandom(4096),
    ],
    ids=["nothing", "one byte", "HTTP", "huge", "zeros", "noise"],
)
def test_junk_hurts_nobody(agent: Agent, lab: Lab, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(LIMIT)
        peer.connect(str(agent.run / "agent/cni.sock"))
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):  # it hung up on what it had not read
            assert peer.recv(1) == b""
    pod = lab.pod()
    agent.shim()("ADD", config(**WIRE), netns=pod).ok()


def test_another_user_is_refused(agent: Agent) -> None:
    """Even where the folder's mode would let him in."""
    socket_path = agent.run / "agent/cni.sock"
    assert socket_path.stat().st_mode & 0o777 == 0o600
    assert socket_path.parent.stat().st_mode & 0o777 == 0o700
    script = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); os.setresuid(7, 7, 7);"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(1))"
    )
    for path in (agent.run, socket_path.parent, *list(agent.run.parents)[:4]):
        path.chmod(0o755)
    socket_path.chmod(0o666)
    done = subprocess.run(
        [sys.executable, "-c", script, socket_path], capture_output=True, text=True, check=False
    )
    assert done.stdout == "b''\n", done.stderr
    assert "uid 7" in agent.wait_for("refused")["why"]


def test_a_second_agent_takes_over_the_socket(agent: Agent, lab: Lab) -> None:
    """As in a rolling update: the old one ends what it has, new requests go to the new one."""
    second = Agent(lab.node, agent.run, agent.policy).start()
    pod = lab.pod()
    agent.end()
    agent.shim()("ADD", config(**WIRE), netns=pod).ok()
    second.end()


def test_logs_have_the_attachments_id(agent: Agent, lab: Lab) -> None:
    agent.shim()("ADD", config(source="nosuch"), netns=lab.pod(), container="c7").error(104)
    line = agent.wait_for("request")
    assert (line["command"], line["container"], line["ifname"], line["code"]) == ("ADD", "c7", "net1", 104)
    assert line["level"] == "warning"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--reconcile-seconds", "0"], "reconcileSeconds"),
        (["--run", "relative"], "run"),
        (["--config", "/nonexistent"], "no such file"),
    ],
)
def test_wrong_settings_are_named(flags: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cni.agent", *flags], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(json.dumps({"run": str(tmp_path / "elsewhere"), "logLevel": "warning"}))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from cni.agent import settings; print(settings.load(sys.argv[1:]))",
            "--config",
            file,
            "--run",
            "/r",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "run='/r'" in done.stdout
    assert "log_level='warning'" in done.stdout
    assert "drain_seconds=30" in done.stdout


def test_threads_and_fds_stay_few(agent: Agent, lab: Lab) -> None:
    pod, shim = lab.pod(), agent.shim()
    assert agent.process

    def counts() -> tuple[int, int]:
        assert agent.process
        folder = Path(f"/proc/{agent.process.pid}")
        return len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir()))

    for _ in range(20):
        shim("ADD", config(**WIRE), netns=pod).ok()
        shim("DEL", config(**WIRE), netns=pod).ok()
    before = counts()
    for _ in range(50):
        shim("ADD", config(**WIRE), netns=pod).ok()
        shim("DEL", config(**WIRE), netns=pod).ok()

    def few() -> bool:
        threads, fds = counts()
        # Spare ones to serve and to delete links; and for each that serves a socket and a namespace.
        return threads <= before[0] + 2 * 8 and fds <= before[1] + 2 * 8

    until(few, f"{before} threads and fds have become more")  # a link's end is answered before it is over


def test_killed_and_started_again(agent: Agent, lab: Lab) -> None:
    pod, shim = lab.pod(), agent.shim()
    shim("ADD", config(**WIRE), netns=pod).ok()
    agent.end(signal.SIGKILL)
    agent.start()
    shim("DEL", config(**WIRE), netns=pod).ok()
    assert shim.leftovers() == []


def test_threads_of_one_process_share_nothing(agent: Agent, lab: Lab) -> None:
    """ADD and DEL of one key, at once and many times: serialized, and nothing is left."""
    pod, shim = lab.pod(), agent.shim()
    begin = threading.Barrier(2)

    def many(command: str) -> None:
        for _ in range(10):
            begin.wait(LIMIT)
            shim(command, config(**WIRE), netns=pod)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(many, command) for command in ("ADD", "DEL")]:
            each.result()
    shim("DEL", config(**WIRE), netns=pod).ok()
    assert pod.links().keys() == {"lo"}
    assert shim.leftovers() == []
