"""The shim: what it sends, what it does when the agent is away, slow or dying, and that its C is sound."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.agent import wire
from cni.attach.call import Request
from cni.spec import VERSIONS
from tests.agent.conftest import SHIM, Agent
from tests.runner import config
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.wire import Lab

SOURCE = SHIM.with_name("vmtap.c")
TAIL = struct.Struct("=iII")
WIRE = {"source": "eth1", "mode": "bridge"}


@pytest.fixture
def away(lab: Lab, tmp_path: Path) -> Agent:
    """An agent that has run, and is not running."""
    made = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml")
    (made.run / "agent").mkdir(parents=True)
    return made


class Fake:
    """In the agent's place: does one thing to each connection, in turn."""

    def __init__(self, run: Path, acts: list[Callable[[socket.socket], None]]) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(run / "agent/cni.sock"))
        self.listener.listen()
        self.asked: list[Request | None] = []
        self.thread = threading.Thread(target=self._serve, args=(acts,))
        self.thread.start()

    def _serve(self, acts: list[Callable[[socket.socket], None]]) -> None:
        for act in acts:
            connection, _ = self.listener.accept()
            with connection:
                self.asked.append(wire.receive(connection))
                act(connection)

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.join(20)
        self.listener.close()
        for asked in self.asked:
            if asked and asked.netns is not None:
                os.close(asked.netns)


def _hang_up(_: socket.socket) -> None: ...


def _answer(stdout: bytes = b"", status: int = 0, stderr: bytes = b"") -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(
        TAIL.pack(status, len(stdout), len(stderr)) + stdout + stderr
    )


def test_it_is_static_and_small() -> None:
    assert SHIM.stat().st_size < 100_000
    assert b"statically linked" in subprocess.run(["file", SHIM], capture_output=True, check=True).stdout


def test_an_attachments_life(agent: Agent, lab: Lab) -> None:
    pod, shim = lab.pod(), agent.shim()
    answer = shim("ADD", config(**WIRE), netns=pod).ok()
    assert pod.links()["net1"]["address"] == answer["interfaces"][0]["mac"]
    assert shim("CHECK", config(**WIRE, prevResult=answer), netns=pod).ok() == {}
    assert shim("STATUS", config(**WIRE)).ok() == {}
    assert shim("ADD", config(**WIRE), netns=pod).error(101)
    assert shim("DEL", config(**WIRE), netns=pod).ok() == {}
    assert "net1" not in pod.links()
    assert shim("DEL", config(**WIRE)).ok() == {}
    assert shim.leftovers() == []


def test_the_agent_gets_all_of_it(away: Agent, lab: Lab) -> None:
    pod = lab.pod()
    env = {"CNI_NETNS": str(pod.path), "CNI_PATH": "/a:/b", "ODD": "x=y=z", "EMPTY": "", "BYTES": "\udcff"}
    with Fake(away.run, [_answer(b"out", 3, b"err")]) as fake:
        shim = away.shim()
        answer = shim.run("ADD", b"stdin\0bytes", {**shim.env, **env})
        assert (answer.status, answer.stdout, answer.stderr) == (3, b"out", "err")
        asked = fake.asked[0]
        assert asked
        assert env.items() <= asked.env.items()
        assert (asked.called_as, asked.stdin) == ("vmtap", b"stdin\0bytes")
        assert asked.netns is not None
        assert os.fstat(asked.netns).st_ino == pod.path.stat().st_ino


def test_the_old_plugins_name_is_passed_on(away: Agent) -> None:
    with Fake(away.run, [_answer()]) as fake:
        away.shim(name="macvtap")("STATUS", config())
        assert fake.asked[0]
        assert fake.asked[0].called_as == "macvtap"


def test_a_pipe_for_a_namespace_does_not_block(agent: Agent, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    agent.shim()("ADD", config(**WIRE), netns=tmp_path / "pipe").error(8)
    agent.shim()("ADD", config(**WIRE), netns=tmp_path / "missing").error(8)


@pytest.mark.parametrize("size", [1 << 16, 1 << 20])
def test_sizes_are_no_trap(away: Agent, size: int) -> None:
    with Fake(away.run, [_answer(b"x" * (4 * size))]) as fake:
        answer = away.shim()("STATUS", bytes(size))
        assert answer.stdout == b"x" * (4 * size)
        assert fake.asked[0]
        assert fake.asked[0].stdin == bytes(size)


def test_a_config_that_is_too_large_is_refused_here(away: Agent) -> None:
    away.shim()("ADD", bytes((1 << 20) + 1)).error(6)


def test_a_large_previous_result_passes(agent: Agent, lab: Lab) -> None:
    """A prevResult of nearly 256 KiB comes back out of a chain, whole."""
    shim, pod = agent.shim(), lab.pod()
    before = {"cniVersion": "1.1.0", "interfaces": [{"name": f"{number:0500}"} for number in range(500)]}
    conf = config(**WIRE, prevResult=before)
    answer = shim("ADD", json.dumps(conf, separators=(",", ":")).encode(), netns=pod).ok()
    assert len(answer["interfaces"]) == 501
    shim("DEL", config(**WIRE), netns=pod).ok()


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)])
def test_without_an_agent_others_are_told_so(away: Agent, command: str, code: int) -> None:
    error = away.shim(wait=0)(command, config(**WIRE)).error(code)
    assert "vmtapd" in error["msg"]


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (b'{"cniVersion": "0.4.0"}', "0.4.0"),
        (b'{"cniVersion":"9.9"}', "9.9"),
        (b"", "1.1.0"),
        (b'{"cniVersion": 7}', "1.1.0"),
        (b'{"cniVersion": "1.0.0\\""}', "1.1.0"),
        (b'{"cniVersion"', "1.1.0"),
        (b'{"cniVersion":"' + b"1" * 99 + b'"}', "1.1.0"),
    ],
)
def test_without_an_agent_version_is_answered(away: Agent, stdin: bytes, version: str) -> None:
    assert away.shim(wait=0)("VERSION", stdin).ok() == {
        "cniVersion": version,
        "supportedVersions": list(VERSIONS),
    }


def test_without_an_agent_del_succeeds_and_is_left_for_it(away: Agent, lab: Lab) -> None:
    assert away.shim(wait=0)("DEL", config(**WIRE), container="c7", netns=lab.pod()).ok() == {}
    (left,) = (away.run / "pending").iterdir()
    assert left.stat().st_mode & 0o777 == 0o600
    asked = wire.parse(left.read_bytes())
    assert (asked.env["CNI_COMMAND"], asked.env["CNI_CONTAINERID"]) == ("DEL", "c7")
    assert json.loads(asked.stdin) == config(**WIRE)


def test_del_succeeds_where_no_agent_ever_ran(lab: Lab, tmp_path: Path) -> None:
    nowhere = Agent(lab.node, tmp_path / "nowhere", tmp_path / "x")
    assert nowhere.shim()("DEL", config(**WIRE)).ok() == {}
    assert not nowhere.run.exists()


def test_it_waits_for_an_agent_that_starts(away: Agent, lab: Lab) -> None:
    pod, shim = lab.pod(), away.shim(wait=30)
    with subprocess.Popen(
        shim.argv(), env=shim.environment("ADD", pod), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as waiting:
        assert waiting.stdin
        waiting.stdin.write(json.dumps(config(**WIRE)).encode())
        waiting.stdin.close()
        away.start()
        assert waiting.stdout
        answer = json.loads(waiting.stdout.read())
        assert waiting.wait(LIMIT) == 0
    assert answer["interfaces"][0]["name"] == "net1"
    away.end()


@pytest.mark.parametrize("command", ["DEL", "CHECK", "STATUS"])
def test_what_can_be_repeated_is_when_the_agent_dies(away: Agent, command: str) -> None:
    with Fake(away.run, [_hang_up, _hang_up, _answer()]) as fake:
        assert away.shim()(command, config()).status == 0
    assert len(fake.asked) == 3


@pytest.mark.parametrize(("command", "code"), [("CHECK", 11), ("STATUS", 50), ("DEL", 0)])
def test_an_agent_that_always_hangs_up_is_as_good_as_none(away: Agent, command: str, code: int) -> None:
    with Fake(away.run, [_hang_up, _hang_up, _hang_up]) as fake:
        answer = away.shim()(command, config())
    assert answer.ok() == {} if code == 0 else answer.error(code)
    assert len(fake.asked) == 3


def test_an_add_is_not_repeated_but_11(away: Agent) -> None:
    """It may have been carried out: the runtime sends DEL, and only then another ADD."""
    with Fake(away.run, [_hang_up]):
        away.shim()("ADD", config()).error(11)


def test_half_an_answer_is_none(away: Agent) -> None:
    with Fake(away.run, [lambda connection: connection.sendall(TAIL.pack(0, 100, 0) + b"{")]):
        answer = away.shim()("ADD", config())
    assert answer.error(11)["code"] == 11


def test_an_agent_that_hangs_meets_a_deadline(away: Agent) -> None:
    over = threading.Event()

    def hang(_: socket.socket) -> None:
        over.wait(LIMIT)

    with Fake(away.run, [hang]):
        away.shim(wait=0)("ADD", config(), env={"VMTAP_DEADLINE": "1"}).error(11)
        over.set()


def test_an_add_whose_answer_nobody_reads_is_undone(agent: Agent, lab: Lab) -> None:
    pod, shim = lab.pod(), agent.shim()
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            shim.argv(),
            env=shim.environment("ADD", pod),
            input=json.dumps(config(**WIRE)).encode(),
            stdout=full,
            check=False,
        )
    assert done.returncode != 0
    assert "net1" not in pod.links()
    assert shim.leftovers() == []


def test_about(away: Agent) -> None:
    done = subprocess.run(
        [SHIM], env={}, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    assert done.stdout == ""
    assert "1.1.0" in done.stderr


def test_a_shim_that_is_killed_takes_nothing_with_it(away: Agent) -> None:
    begun, over = threading.Event(), threading.Event()

    def wait(_: socket.socket) -> None:
        begun.set()
        over.wait(LIMIT)

    with Fake(away.run, [wait]):
        shim = away.shim()
        with subprocess.Popen(
            shim.argv(), env=shim.environment("ADD", ""), stdin=subprocess.DEVNULL
        ) as process:
            assert begun.wait(LIMIT)
            process.send_signal(signal.SIGKILL)
        over.set()
    assert not (away.run / "pending").exists()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim with the address and undefined behaviour sanitizers in it."""
    made = tmp_path_factory.mktemp("shim") / "vmtap"
    flags = [
        "-std=c11",
        "-g",
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    subprocess.run(["gcc", *flags, "-o", made, SOURCE], check=True)
    return made


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run folder whose agent answers each request with what it got."""
    run = tmp_path_factory.mktemp("echo")
    (run / "agent").mkdir()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(run / "agent/cni.sock"))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked = wire.receive(connection)
                if asked:
                    if asked.netns is not None:
                        os.close(asked.netns)
                    _answer(asked.stdin, 0, asked.env.get("CNI_ARGS", "").encode(errors="surrogateescape"))(
                        connection
                    )

    thread = threading.Thread(target=serve)
    thread.start()
    yield run
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


printable = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from(["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "", "x" * 5000]),
    stdin=st.binary(max_size=5000),
    args=printable,
    netns=printable,
)
def test_any_request_under_the_sanitizers(
    sanitized: Path, echo: Path, *, command: str, stdin: bytes, args: str, netns: str
) -> None:
    env = {"CNI_COMMAND": command, "CNI_ARGS": args, "CNI_NETNS": netns, "VMTAP_RUN": str(echo)}
    done = subprocess.run([sanitized], input=stdin, env=env, capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout) == (0, stdin), done.stderr.decode()
    assert done.stderr == args.encode()


@pytest.mark.parametrize("names", [["VMTAP_RUN"], ["VMTAP_STATE"], ["VMTAP_STATE", "VMTAP_RUN"]])
def test_the_folder_has_one_name_and_an_alias(echo: Path, tmp_path: Path, names: list[str]) -> None:
    """Of two variables, VMTAP_RUN counts."""
    env = dict.fromkeys(names[:-1], str(tmp_path)) | {names[-1]: str(echo)}
    env |= {"CNI_COMMAND": "STATUS", "VMTAP_WAIT": "0"}
    done = subprocess.run([SHIM], input=b"asked", env=env, capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout) == (0, b"asked"), done.stderr.decode()


@pytest.mark.parametrize("command", ["ADD", "DEL", "VERSION"])
@pytest.mark.parametrize("there", [True, False])
def test_valgrind_finds_nothing(echo: Path, tmp_path: Path, command: str, there: bool) -> None:
    made = tmp_path / "vmtap"
    subprocess.run(["gcc", "-std=c11", "-g", "-O1", "-o", made, SOURCE], check=True)
    env: dict[str, Any] = {
        "PATH": os.environ["PATH"],
        "CNI_COMMAND": command,
        "VMTAP_RUN": str(echo if there else tmp_path),
        "VMTAP_WAIT": "0",
    }
    valgrind = shutil.which("valgrind")
    assert valgrind, "valgrind is not installed: lab/setup test"
    argv = [valgrind, "-q", str(made)]
    argv[2:2] = ["--error-exitcode=99", "--leak-check=full", "--track-fds=yes"]
    done = subprocess.run(
        argv, input=b'{"cniVersion":"1.1.0"}', env=env, capture_output=True, timeout=LIMIT, check=False
    )
    assert done.returncode != 99, done.stderr.decode()
