"""What happens to the process: told to end, deaf and mute standard streams, and many of them at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni import __main__ as executable
from cni import plugin as product
from cni import spec
from cni.attach.call import Node, Request
from cni.config.policy import load as load_policy
from lab.wire import BRIDGE, NIC
from tests.fakeipam import HANG, FakeIpam
from tests.faults.baseline import processes
from tests.faults.inject import Point, points
from tests.runner import config
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.wire import Lab, Netns
    from tests.faults.baseline import Baseline
    from tests.faults.inject import Injector
    from tests.runner import Answer, Plugin

IPAM = FakeIpam.config


def wait_until_it_catches_sigterm(pid: int) -> None:
    def caught() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)

    until(caught, "it does not catch SIGTERM", lambda signals: bool(signals & 1 << (signal.SIGTERM - 1)))


@contextlib.contextmanager
def started(
    plugin: Plugin, command: str, conf: dict[str, Any] | bytes, netns: Netns, **streams: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """The executable, under way; ended at the end if it did not by itself."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    with subprocess.Popen(
        plugin.argv(), stdin=subprocess.PIPE, env=plugin.environment(command, netns), **streams
    ) as process:
        try:
            assert process.stdin
            process.stdin.write(conf if isinstance(conf, bytes) else json.dumps(conf).encode())
            process.stdin.flush()
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_while_a_delegate_hangs(
    plugin: Plugin, ipam: FakeIpam, pod: Netns, baseline: Baseline, number: int
) -> None:
    ipam.write(ADD=HANG)
    with started(plugin, "ADD", config(source=NIC, ipam=IPAM), pod) as process:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
        until((ipam.seen / "hanging").exists, "the delegate does not hang")
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, err
    assert json.loads(out)["code"] == spec.TRY_AGAIN_LATER
    assert ipam.commands() == ["ADD", "DEL"]
    baseline.holds()


def test_told_to_end_while_it_reads(plugin: Plugin, pod: Netns, baseline: Baseline) -> None:
    with started(plugin, "ADD", b'{"cniVersion": ', pod) as process:
        wait_until_it_catches_sigterm(process.pid)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert json.loads(out)["code"] == spec.TRY_AGAIN_LATER
    assert b"Traceback" not in err
    baseline.holds()


@pytest.mark.parametrize("source", [NIC, BRIDGE])
def test_told_to_end_at_each_step(
    *, injector: Injector, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, source: str
) -> None:
    """SIGTERM as each message to the kernel is sent, and as the answer is written."""
    device = "tap" if source == BRIDGE else "macvtap"
    conf = config(source=source, device=device, ipam=IPAM)
    handle("ADD", conf, netns=pod).ok()
    handle("DEL", conf, netns=pod).ok()
    _, trace = injector("ADD", conf, "-e", "trace=sendto,symlink,rename,write", netns=pod)
    handle("DEL", conf, netns=pod).ok()

    def told(step: Point) -> bool:
        """Whether it was told as the answer was written."""
        option = f"inject={step.call}:signal=SIGTERM:when={step.nth}"
        answer, seen = injector("ADD", conf, "-e", f"trace={step.call}", "-e", option, netns=pod)
        late = "write(1, " in seen.partition("--- SIGTERM")[0]
        try:
            assert answer.stdout.count(b"\n") == 1
            assert "Traceback" not in answer.stderr
            if late:  # too late: the answer was on its way
                answer.ok()
                handle("DEL", conf, netns=pod).ok()
            else:
                answer.error(spec.TRY_AGAIN_LATER)
            baseline.holds()
        except AssertionError as error:
            error.add_note(f"at {step}: {answer}")
            raise
        return late

    for step in points(trace):
        # While another holds the kernel's lock, a write to a sysctl begins anew and anew, and each time counts:
        # the signal then comes before its step.
        wanted = step.text.startswith("1, ")
        assert any(told(step) == wanted for _ in range(20)), f"the signal never came at {step}"


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full"])
def test_the_answer_cannot_be_written(
    plugin: Plugin, ipam: FakeIpam, pod: Netns, baseline: Baseline, redirection: str
) -> None:
    conf = json.dumps(config(source=NIC, ipam=IPAM)).encode()
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *plugin.argv()],
        input=conf,
        env=plugin.environment("ADD", pod),
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1
    assert ipam.commands() == ["ADD", "DEL"]
    baseline.holds()


def test_a_broken_pipe_undoes(plugin: Plugin, ipam: FakeIpam, pod: Netns, baseline: Baseline) -> None:
    read, write = os.pipe()
    os.close(read)
    with started(plugin, "ADD", config(source=NIC, ipam=IPAM), pod, stdout=write) as process:
        os.close(write)
        process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert ipam.commands() == ["ADD", "DEL"]
    baseline.holds()


@pytest.mark.parametrize("stream", ["2>&-", "2> /dev/full", "2>&- 3>&-"])
@pytest.mark.parametrize("good", [True, False])
def test_stderr_cannot_be_written(
    *, plugin: Plugin, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, stream: str, good: bool
) -> None:
    """What nobody can read does not count: stdout has one document as ever."""
    conf = config(source=NIC) if good else config(source="nothing")
    done = subprocess.run(
        ["sh", "-c", f'"$@" {stream}', "sh", *plugin.argv()],
        input=json.dumps(conf).encode(),
        env=plugin.environment("ADD", pod),
        stdout=subprocess.PIPE,
        timeout=LIMIT,
        check=False,
    )
    document = json.loads(done.stdout)
    assert (done.returncode, "code" in document) == ((0, False) if good else (1, True))
    handle("DEL", config(source=NIC), netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize(("redirection", "code"), [("<&-", 6), ("< /dev/null", 6), ("0> /dev/null", 5)])
def test_stdin_is_no_config(
    plugin: Plugin, pod: Netns, baseline: Baseline, redirection: str, code: int
) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *plugin.argv()],
        env=plugin.environment("ADD", pod),
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == code
    assert b"Traceback" not in done.stderr
    baseline.holds()


def test_stdin_that_never_ends(plugin: Plugin, pod: Netns, baseline: Baseline) -> None:
    with started(plugin, "ADD", json.dumps(config(source=NIC)).encode(), pod) as process:
        assert process.stdout
        document = json.loads(process.stdout.read())  # stdin stays open
        assert process.wait(LIMIT) == 1
    assert document["code"] == spec.IO_FAILURE
    baseline.holds()


def test_stdin_that_is_too_long(plugin: Plugin, pod: Netns, baseline: Baseline) -> None:
    config_of = (
        b'{"cniVersion":"1.1.0","name":"wire","type":"vmtap","source":"eth1"' + b" " * (1 << 20) + b"}"
    )
    plugin("ADD", config_of, netns=pod).error(spec.DECODING_FAILURE)
    baseline.holds()


@pytest.mark.parametrize("given", [None, ""])
def test_an_empty_setting_is_none(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    """An empty state folder would be the machine's root, and its dev the machine's /dev."""
    for name in ("VMTAP_RUN", "VMTAP_STATE", "VMTAP_POLICY"):
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given)
    monkeypatch.setenv("CNI_COMMAND", "VERSION")
    seen: list[Node] = []

    def handle(_: Request, node: Node) -> product.Response:
        seen.append(node)
        return product.Response(b"", 0)

    monkeypatch.setattr(product, "handle", handle)
    monkeypatch.setattr(executable, "_read", lambda: b"")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert executable.main() == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    (node,) = seen
    assert node.store.folder == "/run/vmtap"
    assert isinstance(node.policy, partial)
    assert (node.policy.func, node.policy.args) == (load_policy, ("/etc/vmtap/interfaces.yaml",))


def test_two_adds_of_one_key(plugin: Plugin, ipam: FakeIpam, pod: Netns, baseline: Baseline) -> None:
    conf = config(source=NIC, ipam=IPAM)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: plugin("ADD", conf, netns=pod), range(4)))
    won = [answer for answer in answers if answer.status == 0]
    assert len(won) == 1, answers
    for answer in answers:
        if answer.status:
            answer.error(spec.NAME_IN_USE)
    plugin("CHECK", conf | {"prevResult": won[0].document}, netns=pod).ok()
    assert ipam.leases() == {"c1-net1"}
    plugin("DEL", conf, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize("source", [NIC, BRIDGE])
def test_add_and_del_of_one_key(plugin: Plugin, pod: Netns, baseline: Baseline, source: str) -> None:
    """One after the other, in either order: no half of anything."""
    conf = config(source=source, ipam=IPAM)
    with ThreadPoolExecutor(4) as pool:
        commands = ["ADD", "DEL", "ADD", "DEL"]
        answers = list(pool.map(lambda command: plugin(command, conf, netns=pod), commands))
    for command, answer in zip(commands, answers, strict=True):
        if command == "DEL" or answer.status == 0:
            answer.ok()
        else:
            answer.error(spec.NAME_IN_USE)
    if "net1" in pod.links():
        last = [answer for answer in answers if answer.stdout and answer.status == 0][-1]
        plugin("CHECK", conf | {"prevResult": last.document}, netns=pod).ok()
    else:
        baseline.holds()
    plugin("DEL", conf, netns=pod).ok()
    baseline.holds()


def test_a_hundred_adds_on_one_lower(lab: Lab, plugin: Plugin, ipam: FakeIpam) -> None:
    count = 100
    pods = [lab.pod(f"p{at}") for at in range(count)]
    before = lab.node.links()[NIC]["promiscuity"]

    def run(command: str, at: int) -> Answer:
        return plugin(command, config(source=NIC, mode="bridge"), netns=pods[at], container=f"c{at}")

    with ThreadPoolExecutor(16) as pool:
        for answer in pool.map(lambda at: run("ADD", at), range(count)):
            answer.ok()
        links = [pod.links()["net1"] for pod in pods]
        assert len({link["ifindex"] for link in links}) == len({link["address"] for link in links}) == count
        for answer in pool.map(lambda at: run("DEL", at), range(count)):
            answer.ok()
    assert all("net1" not in pod.links() for pod in pods)
    assert plugin.leftovers() == []
    assert processes(plugin.state) == []
    assert lab.node.links()[NIC]["promiscuity"] == before
