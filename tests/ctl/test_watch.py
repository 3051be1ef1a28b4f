"""watch: each event is told by the kernel, so each test waits for a line and for nothing else."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from cni.ctl.execs import Execs
from tests.ctl.conftest import Ctl
from tests.waiting import LIMIT, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab, Netns


class Watch:
    """A vmtapctl watch --json. What happens after the first look is told: the first event is that of `here`."""

    def __init__(self, ctl: Ctl, *words: str) -> None:
        self.process = subprocess.Popen(
            ctl.argv("watch", *words), env=ctl.env(), stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self.process.stdout
        with watched(self.process):  # not select(2): two lines may have come at once
            line = self.process.stdout.readline()
        assert line, "nothing was told"
        return line

    def event(self) -> tuple[str, str, str]:
        """(what, ifname, status)."""
        event: dict[str, Any] = json.loads(self.line())
        return event["event"], event["attachment"]["ifname"], event["attachment"]["status"]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


@contextmanager
def watching(ctl: Ctl, *words: str) -> Iterator[Watch]:
    watch = Watch(ctl, *words)
    try:
        yield watch
    finally:
        watch.process.kill()
        watch.process.communicate()


SLEEPER = """
import os, sys
from cni.kernel import netns, tapdev
from cni.state.store import in_netns
folder, path, ifname = sys.argv[1:]
namespace = netns.open_path(path)
records = in_netns(folder, netns.identity(namespace))
[record] = [record for record in records if record.ifname == ifname]
[fd] = tapdev.open_queues(namespace, record, 1)
os.set_inheritable(fd, True)
os.execvp("sleep", ["sleep", "60"])
"""
"""As a launcher does it: were the fd handed on by another process, each of the two as its holder would be news."""


@contextmanager
def sleeper(ctl: Ctl, pod: Netns, ifname: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the attachment, soon."""
    argv = [sys.executable, "-c", SLEEPER, str(ctl.plugin.state), str(pod.path), ifname]
    with subprocess.Popen(argv) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_comes_and_goes(ctl: Ctl, lab: Lab, number: int) -> None:
    here, pod = lab.pod("here"), lab.pod("pod")
    ctl.add(here, container="h", ifname="here", device="tap")
    with watching(ctl, "--json") as watch:
        assert watch.event() == ("present", "here", "idle")
        ctl.add(pod)
        assert watch.event() == ("attached", "net1", "idle")
        ctl.add(pod, ifname="net2", device="tap")
        assert watch.event() == ("attached", "net2", "idle")
        with sleeper(ctl, pod, "net2"):
            assert watch.event() == ("changed", "net2", "in use")
        assert watch.event() == ("changed", "net2", "idle")
        lab.switch.ip("link set node down")
        assert watch.event() == ("changed", "net1", "no carrier")
        lab.switch.ip("link set node up")
        assert watch.event() == ("changed", "net1", "idle")
        ctl.delete(pod)
        assert watch.event()[:2] == ("detached", "net1")
        pod.ip("link delete net2")
        assert watch.event() == ("changed", "net2", "gone")
        assert watch.end(number) == 0


def test_before_anything_was_attached(ctl: Ctl, pod: Netns) -> None:
    """Nor is there a state folder; without a terminal an event is a plain line."""
    with watching(ctl) as watch:
        ctl.add(pod, name="web")
        line = watch.line()
        assert "  shop/web net1  macvtap bridge on eth1" in line
        assert "\x1b" not in line
        assert watch.end(signal.SIGINT) == 0


def test_a_launcher_that_becomes_qemu_is_news(ctl: Ctl, pod: Netns) -> None:
    """The kernel tells it in its first network namespace only, so watch's ear is tested there, and not in the lab."""
    ctl.add(pod)
    ear = Execs()
    try:
        subprocess.run(["true"], check=True)
        assert select.select([ear], [], [], LIMIT)[0]
        ear.relevant()
        with sleeper(ctl, pod, "net1"):
            heard = False
            while not heard:
                assert select.select([ear], [], [], LIMIT)[0]
                heard = ear.relevant()
    finally:
        ear.close()
