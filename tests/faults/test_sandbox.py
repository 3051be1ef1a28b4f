"""Faults of the pod's namespace, its path and its links; and that only what is ours is ever removed."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni import spec
from lab.wire import BRIDGE, NIC
from tests.fakeipam import GATE, FakeIpam
from tests.faults.baseline import links
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab, Netns
    from tests.faults.baseline import Baseline
    from tests.faults.inject import Injector
    from tests.runner import Answer, Plugin

IPAM = FakeIpam.config
KINDS: list[dict[str, Any]] = [
    {"source": NIC},
    {"source": BRIDGE, "device": "tap"},
    {"device": "tap"},
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["macvtap", "bridge-tap", "plain-tap"])


@pytest.mark.parametrize("command", ["ADD", "CHECK"])
@pytest.mark.parametrize(
    "what",
    ["missing", "file", "fifo", "folder", "device", "socket", "symlink", "dangling", "pid namespace", "own"],
)
def test_a_path_that_is_no_pods_namespace(
    *, plugin: Plugin, baseline: Baseline, tmp_path: Path, what: str, command: str
) -> None:
    """8, and never a wait: the executable has a deadline in here."""
    path = tmp_path / "netns"
    match what:
        case "file":
            path.write_text("")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            os.mknod(path, stat.S_IFSOCK)
        case "symlink":
            (tmp_path / "target").write_text("")
            path.symlink_to(tmp_path / "target")
        case "dangling":
            path.symlink_to(tmp_path / "nothing")
        case "pid namespace":
            path.symlink_to("/proc/self/ns/pid")
        case "own":
            path.symlink_to(plugin.node.path)
    previous = {"prevResult": {"cniVersion": "1.1.0", "interfaces": []}} if command == "CHECK" else {}
    plugin(command, config(source=NIC, ipam=IPAM, **previous), netns=path).error(spec.INVALID_NETNS)
    plugin("DEL", config(source=NIC, ipam=IPAM), netns=path).ok()
    baseline.holds()


def test_a_symlink_to_a_namespace_is_fine(
    plugin: Plugin, pod: Netns, baseline: Baseline, tmp_path: Path
) -> None:
    path = tmp_path / "netns"
    path.symlink_to(pod.path)
    result = plugin("ADD", config(source=NIC), netns=path).ok()
    assert result["interfaces"][0]["sandbox"] == str(path)
    plugin("DEL", config(source=NIC), netns=path).ok()
    baseline.holds()


@each_kind
def test_the_namespace_goes_before_del(
    lab: Lab, handle: Callable[..., Answer], baseline: Baseline, kind: dict[str, Any]
) -> None:
    conf = config(ipam=IPAM, **kind)
    pod = lab.pod("short")
    path = str(pod.path)
    handle("ADD", conf, netns=pod).ok()
    pod.close()
    for netns in (path, None, path):
        handle("DEL", conf, netns=netns).ok()
        baseline.holds()


@each_kind
def test_the_path_goes_and_the_namespace_stays(
    lab: Lab, handle: Callable[..., Answer], baseline: Baseline, kind: dict[str, Any]
) -> None:
    """DEL without a path, while something keeps the namespace: the record reaches the link."""
    conf = config(ipam=IPAM, **kind)
    pod = lab.pod("kept")
    handle("ADD", conf, netns=pod).ok()
    with pod.path.open():
        sleeper = subprocess.Popen(pod.argv(["sleep", "600"]))
        try:
            pod_links = ["nsenter", f"--net=/proc/{sleeper.pid}/ns/net", "ip", "-br", "link", "show"]
            wait_until_inside(sleeper.pid)
            pod.close()
            assert "net1" in subprocess.run(pod_links, capture_output=True, text=True, check=True).stdout
            handle("DEL", conf).ok()
            assert "net1" not in subprocess.run(pod_links, capture_output=True, text=True, check=True).stdout
        finally:
            sleeper.kill()
            sleeper.wait()
    baseline.holds()


def wait_until_inside(pid: int) -> None:
    """nsenter has become sleep."""
    until(Path(f"/proc/{pid}/comm").read_text, "nsenter did not start sleep", lambda name: name == "sleep\n")


def test_the_path_goes_during_add(
    lab: Lab, plugin: Plugin, ipam: FakeIpam, handle: Callable[..., Answer], baseline: Baseline
) -> None:
    """While the delegate runs: the namespace is held open by then, so the ADD succeeds; DEL ends it."""
    conf = config(source=NIC, ipam=IPAM)
    pod = lab.pod("short")
    path = str(pod.path)
    fifo = ipam.seen / "gate"
    os.mkfifo(fifo)
    ipam.write(ADD=GATE)
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(plugin("ADD", conf, netns=path)))
    thread.start()
    with fifo.open("w"):  # the delegate has come to the gate, or this would not open
        pod.close()
    thread.join()
    answers[0].ok()
    handle("DEL", conf, netns=path).ok()
    baseline.holds()


def test_the_namespace_goes_during_add(
    lab: Lab, injector: Injector, handle: Callable[..., Answer], baseline: Baseline
) -> None:
    """It can be opened no more, or entered no more: 8."""
    conf = config(source=NIC, ipam=IPAM)
    pod = lab.pod("short")
    answer, _ = injector("ADD", conf, "-e", "inject=setns:error=EINVAL:when=1", netns=pod)
    answer.error(spec.INVALID_NETNS)
    answer, _ = injector("ADD", conf, "-e", "inject=openat:error=ENOENT", "-P", str(pod.path), netns=pod)
    answer.error(spec.INVALID_NETNS)
    baseline.holds()


@each_kind
def test_del_first_and_del_thrice(
    handle: Callable[..., Answer], pod: Netns, baseline: Baseline, kind: dict[str, Any]
) -> None:
    conf = config(ipam=IPAM, **kind)
    assert handle("DEL", conf, netns=pod).stdout == b""
    handle("ADD", conf, netns=pod).ok()
    for netns in (pod, None, pod):
        answer = handle("DEL", conf, netns=netns)
        assert (answer.status, answer.stdout) == (0, b"")
        baseline.holds()


@pytest.mark.parametrize(
    "link",
    [
        "link add net1 type veth peer name other",
        "tuntap add net1 mode tap",
        "link add net1 alias vmtap/another/c1/net1 type veth peer name other",
        "link add net1 alias vmtap/wire/c2/net1 type veth peer name other",
    ],
    ids=["unmarked", "a tap", "another network's", "another container's"],
)
@pytest.mark.parametrize("kind", KINDS[:2], ids=["macvtap", "bridge-tap"])
def test_a_link_of_somebody_else(
    *, handle: Callable[..., Answer], lab: Lab, plugin: Plugin, kind: dict[str, Any], link: str
) -> None:
    """Not touched by ADD, DEL or GC, with and without state of ours."""
    conf = config(ipam=IPAM, **kind)
    pod = lab.pod()
    pod.ip(link)
    before, node = links(pod), links(lab.node)
    handle("ADD", conf, netns=pod).error(spec.NAME_IN_USE)
    handle("DEL", conf, netns=pod).ok()
    handle("GC", conf | {"cni.dev/valid-attachments": []}).ok()
    assert (links(pod), links(lab.node)) == (before, node)
    assert plugin.leftovers() == []


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=["macvtap", "plain-tap"])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_link_that_took_the_place_of_ours(
    *, handle: Callable[..., Answer], lab: Lab, plugin: Plugin, kind: dict[str, Any], recorded: bool
) -> None:
    """The name and even the index are ours, the mark is not."""
    conf = config(**kind)
    pod = lab.pod()
    handle("ADD", conf, netns=pod).ok()
    index = pod.links()["net1"]["ifindex"]
    pod.ip(
        "link del net1",
        f"link add net1 index {index} type veth peer name other",
        "link set net1 alias somebody",
    )
    if not recorded:
        for path in (plugin.state / "attachments").iterdir():
            path.unlink()
    handle("DEL", conf, netns=pod).ok()
    assert pod.links()["net1"]["ifindex"] == index
    assert plugin.leftovers() == []


@each_kind
@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_our_link_under_another_name(
    *, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, kind: dict[str, Any], command: str
) -> None:
    """The mark says whose it is: somebody in the pod has only renamed it."""
    conf = config(**kind)
    handle("ADD", conf, netns=pod).ok()
    pod.ip("link set net1 down", "link set net1 name renamed")
    handle(command, conf | {"cni.dev/valid-attachments": []}, netns=pod).ok()
    baseline.holds()


@each_kind
def test_del_without_any_state(
    *,
    lab: Lab,
    handle: Callable[..., Answer],
    plugin: Plugin,
    pod: Netns,
    baseline: Baseline,
    kind: dict[str, Any],
) -> None:
    conf = config(ipam=IPAM, **kind)
    handle("ADD", conf, netns=pod).ok()
    for path in sorted(plugin.state.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    plugin.state.rmdir()
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()
    handle("ADD", conf, netns=pod).ok()
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()
