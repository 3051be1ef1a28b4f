"""plugin.handle as a long-lived, threaded agent will call it: it keeps nothing, and leaves everything as it was."""

from __future__ import annotations

import gc
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni import plugin as product
from cni.attach.call import Request
from cni.kernel import netns
from lab.wire import BRIDGE, NIC
from tests.fakeipam import FakeIpam
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab, Netns
    from tests.faults.baseline import Baseline
    from tests.runner import Answer, Plugin

IPAM = FakeIpam.config
PAIRS = 100


def resident() -> int:
    """Pages of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1])


def fds() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def request(plugin: Plugin, command: str, conf: dict[str, Any], pod: Netns, container: str) -> Request:
    return Request(plugin.environment(command, pod, container), json.dumps(conf).encode())


@pytest.mark.parametrize("source", [NIC, BRIDGE])
def test_soak(plugin: Plugin, pod: Netns, baseline: Baseline, source: str) -> None:
    """A hundred pairs, most of them one after the other in one thread: fds, threads, memory and the node are flat."""
    conf = config(source=source, device="macvtap" if source == NIC else "tap", owner=107)
    pairs = PAIRS if source == NIC else PAIRS // 4

    def run(count: int) -> None:
        for at in range(count):
            for command in ("ADD", "DEL"):
                response = product.handle(request(plugin, command, conf, pod, f"c{at}"), plugin.given())
                assert response.status == 0, response

    def soak() -> tuple[dict[str, str], int, int]:
        run(5)
        before = fds(), threading.active_count()
        pages = resident()
        run(pairs)
        assert (fds(), threading.active_count()) == before
        return *before, resident() - pages

    *_, grown = plugin.node.call(soak)
    assert grown * os.sysconf("SC_PAGESIZE") < 2 << 20, f"{grown} pages in {pairs} pairs"
    baseline.holds()


def test_errors_leave_nothing_open(plugin: Plugin, pod: Netns, baseline: Baseline) -> None:
    bad: list[dict[str, Any]] = [
        config(source="nothing"),
        config(source=NIC, mtu=9000),
        config(source=NIC, mac="02:00:00:00:00:01", ipam={"type": "nothing"}),
        config(source=BRIDGE, mode="vepa", device="tap"),
        {"name": "x"},
    ]

    def run() -> None:
        for conf in bad:
            assert product.handle(request(plugin, "ADD", conf, pod, "c1"), plugin.given()).status == 1

    def check() -> None:
        run()
        before = fds()
        run()
        assert fds() == before

    plugin.node.call(check)
    baseline.holds()


def test_the_threads_namespace_stays(plugin: Plugin, pod: Netns, baseline: Baseline) -> None:
    conf = config(source=BRIDGE, device="tap", ipam=IPAM, addressing="link")

    def check() -> None:
        home = netns.own_identity()
        for command in ("ADD", "ADD", "CHECK", "STATUS", "GC", "DEL"):
            product.handle(request(plugin, command, conf, pod, "c1"), plugin.given())
            assert netns.own_identity() == home

    plugin.node.call(check)
    baseline.holds()


def test_the_environment_is_the_requests(
    plugin: Plugin, handle: Callable[..., Answer], pod: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process's own environment says counts for nothing."""
    other = {
        "CNI_COMMAND": "DEL",
        "CNI_IFNAME": "wrong0",
        "CNI_CONTAINERID": "wrong",
        "CNI_ARGS": "MAC=wrong",
    }
    for name, value in (other | {"CNI_PATH": "/wrong", "CNI_NETNS": "/wrong", "VMTAP_RUN": "/wrong"}).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    handle("ADD", config(source=NIC, ipam=IPAM), netns=pod).ok()
    assert "net1" in pod.links()
    handle("DEL", config(source=NIC, ipam=IPAM), netns=pod).ok()
    assert dict(os.environ) == before


def test_nothing_is_printed(
    handle: Callable[..., Answer], pod: Netns, capfd: pytest.CaptureFixture[str]
) -> None:
    handle("ADD", config(source=NIC), netns=pod).ok()
    handle("ADD", config(source="nothing"), netns=pod)
    handle("DEL", config(source=NIC), netns=pod).ok()
    assert capfd.readouterr() == ("", "")


def test_many_threads(lab: Lab, handle: Callable[..., Answer], plugin: Plugin) -> None:
    """Different pods at once in one process, and the same key from several threads."""
    pods = [lab.pod(f"p{at}") for at in range(12)]
    conf = config(source=NIC)

    def life(at: int) -> None:
        pod, container = pods[at], f"c{at}"
        for _ in range(3):
            result = handle("ADD", conf, netns=pod, container=container).ok()
            assert list(pod.links()) == ["lo", "net1"]
            handle("CHECK", conf | {"prevResult": result}, netns=pod, container=container).ok()
            handle("DEL", conf, netns=pod, container=container).ok()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(life, range(12)))
        answers = list(pool.map(lambda _: handle("ADD", conf, netns=pods[0]), range(8)))
        assert [answer.status for answer in answers].count(0) == 1
        for answer in pool.map(lambda _: handle("DEL", conf, netns=pods[0]), range(8)):
            answer.ok()
    assert plugin.leftovers() == []


def test_an_fd_instead_of_a_path(plugin: Plugin, pod: Netns, baseline: Baseline) -> None:
    """The caller has opened the namespace: the path need not exist here, and the fd stays the caller's."""
    with pod.path.open("rb") as namespace:
        for command in ("ADD", "DEL"):
            opened = Request(
                plugin.environment(command, "/not/here"),
                json.dumps(config(source=NIC)).encode(),
                netns=namespace.fileno(),
            )
            response = plugin.node.call(partial(product.handle, opened, plugin.given()))
            assert response.status == 0, response
            assert ("net1" in pod.links()) is (command == "ADD")
            os.fstat(namespace.fileno())
    baseline.holds()
