"""Checklist items 27 and 28: whom we run as a delegate and how, and containers in parallel."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import BRIDGE, NIC, Netns
from tests.conformance.test_invocation import each_device
from tests.hanging import executable, living
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conformance.conftest import HostLocal
    from tests.fakeipam import FakeIpam
    from tests.runner import Plugin


def test_item_27_same_input(plugin: Plugin, pod: Netns, fake: FakeIpam) -> None:
    """The delegate has our environment, the whole config to the byte, and our stderr."""
    stdin = json.dumps(config(source=NIC, ipam={"type": "fake", "odd": [1.50, "é"]}), indent=1).encode()
    result: dict[str, Any] = {}
    for command in ("ADD", "CHECK", "DEL"):
        given = (
            stdin if command != "CHECK" else json.dumps(json.loads(stdin) | {"prevResult": result}).encode()
        )
        answer = plugin(command, given, netns=pod, args="IgnoreUnknown=1;A=b", env={"MY_OWN": "variable"})
        result = answer.ok() or result
        assert fake.stdin(command) == given
        seen = fake.env(command)
        wanted = {**plugin.environment(command, pod, args="IgnoreUnknown=1;A=b"), "MY_OWN": "variable"}
        assert {key: seen[key] for key in wanted} == wanted
        assert f"the delegate was asked to {command}" in answer.stderr


def test_item_27_cni_path_only(plugin: Plugin, pod: Netns, fake: FakeIpam, tmp_path: Path) -> None:
    """It is looked for in CNI_PATH's folders, in their order, and nowhere else: not in PATH, not where we are."""
    conf = config(source=NIC, ipam=fake.config)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "fake").write_text("not executable")
    environment = {"PATH": f"{fake.folder}:/usr/bin:/bin", "CNI_PATH": str(elsewhere)}
    assert str(elsewhere) in plugin("ADD", conf, netns=pod, env=environment).error(7)["msg"]
    assert "CNI_PATH" in plugin("ADD", conf, netns=pod, env={**environment, "CNI_PATH": ""}).error(4)["msg"]
    assert fake.log() == []
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])
    plugin("ADD", conf, netns=pod, env={"CNI_PATH": f"/nowhere:{elsewhere}:{fake.folder}"}).ok()
    assert fake.log() == ["ADD c1 net1"]


@pytest.mark.parametrize("kind", ["/absolute", "../cni-path/fake", "./fake", "sub/fake", "..", "."])
def test_item_27_no_path(plugin: Plugin, pod: Netns, fake: FakeIpam, kind: str) -> None:
    """A type with a separator is error 7 and nothing runs (CVE-2021-20206); DEL and GC go on without the delegate."""
    sub = fake.folder / "sub"
    sub.mkdir()
    sub.joinpath("fake").symlink_to(fake.folder / "fake")
    conf = config(source=NIC, ipam={"type": str(fake.folder / "fake") if kind == "/absolute" else kind})
    assert "ipam.type" in plugin("ADD", conf, netns=pod).error(7)["msg"]
    assert "ipam.type" in plugin("STATUS", conf).error(7)["msg"]
    plugin("DEL", conf, netns=pod).ok()
    plugin("GC", conf | {"cni.dev/valid-attachments": []}).ok()
    assert fake.log() == []
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])


@pytest.mark.parametrize(
    ("says", "code", "named"),  # named: in the message or the details
    [
        ("echo junk", 6, "junk"),
        ("echo '[]'", 6, "[]"),
        ("true", 6, "no CNI result"),
        ("""echo '{"ips": [{"address": "10.9.0.5"}]}'""", 6, "ips[0].address"),
        ("""echo '{"cniVersion": "7.0.0"}'""", 6, "7.0.0"),
        ("echo oops; exit 3", 109, "oops"),
        ("kill -9 $$", 109, "status 137"),
        ("""echo '{"code": 11, "msg": "busy", "details": "later"}'; exit 1""", 11, "busy"),
        ("""echo '{"code": "11", "msg": 5}'; exit 1""", 109, "no CNI error"),
        ("yes | head -c 3000000", 109, "more than 256 KiB"),
    ],
)
def test_item_27_fails(plugin: Plugin, fake: FakeIpam, says: str, code: int, named: str) -> None:
    """Whatever the delegate does wrong: an error that shows it (with its own code if it has one), its DEL, no link."""
    fake.write(ADD=says)
    with Netns("pod") as pod:
        error = plugin("ADD", config(source=NIC, ipam=fake.config), netns=pod).error(code)
        assert list(pod.links()) == ["lo"]
    assert "ipam.type 'fake'" in error["msg"]
    assert named in error["msg"] + error.get("details", "")
    assert fake.log() == ["ADD c1 net1", "DEL c1 net1"]
    assert plugin.leftovers() == []


@pytest.mark.parametrize(
    "says",
    [
        'touch "hangs"; exec sleep 600',
        "trap '' TERM; touch hangs; sleep 600",
        'sleep 600 & touch "hangs"; exec sleep 600',
    ],
)
def test_item_27_hangs(plugin: Plugin, pod: Netns, fake: FakeIpam, says: str, tmp_path: Path) -> None:
    """One that hangs is killed at the deadline with all that it started; its DEL runs, and nothing is left."""
    fake.write(ADD=says)
    conf = config(source=NIC, ipam=fake.config)
    patient = executable(tmp_path / "vmtap", fake.seen / "hangs")
    plugin = replace(plugin, executable=str(patient))  # which ends in time, or the test does
    error = plugin("ADD", conf, netns=pod, env={"VMTAP_DELEGATE_SECONDS": "1"}).error(109)
    assert "did not finish ADD in 1 s and was killed" in error["msg"]
    assert fake.log() == ["ADD c1 net1", "DEL c1 net1"]
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])
    until(lambda: living(fake.folder), "something that it started lives on", lambda pids: not pids)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "a", "٣"])
def test_item_27_deadline(plugin: Plugin, text: str) -> None:
    """VMTAP_DELEGATE_SECONDS that is no number of seconds is error 4."""
    error = plugin("STATUS", config(source=NIC), env={"VMTAP_DELEGATE_SECONDS": text}).error(4)
    assert "VMTAP_DELEGATE_SECONDS" in error["msg"]


@each_device
def test_item_28_parallel(
    plugin: Plugin, pods: Callable[[], Netns], host_local: HostLocal, fields: dict[str, Any]
) -> None:
    """Containers at once on one source: every ADD, CHECK and DEL goes well, with an address of its own each."""
    conf = config(ipam=host_local.ipam, **fields)
    before = set(plugin.node.links())
    made = {f"c{number}": pods() for number in range(8)}

    def live(container: str) -> str:
        pod = made[container]
        result = plugin("ADD", conf, netns=pod, container=container).ok()
        plugin("CHECK", conf | {"prevResult": result}, netns=pod, container=container).ok()
        return str(result["ips"][0]["address"])

    def end(container: str) -> None:
        plugin("DEL", conf, netns=made[container], container=container).ok()

    with ThreadPoolExecutor(len(made)) as threads:
        assert len(set(threads.map(live, made))) == len(made)
        macs = {pod.links()["net1"]["address"] for pod in made.values()}
        assert len(macs) == len(made)
        list(threads.map(end, made))
    assert all(list(pod.links()) == ["lo"] for pod in made.values())
    assert (set(plugin.node.links()), host_local.leases(), plugin.leftovers()) == (before, [], [])


@pytest.mark.parametrize("fields", [{"source": NIC}, {"source": BRIDGE, "device": "tap"}])
def test_item_28_same_attachment(
    plugin: Plugin, pod: Netns, host_local: HostLocal, fields: dict[str, Any]
) -> None:
    """The same ADD four times at once: one wins and works, three fail with 101 and change nothing."""
    conf = config(ipam=host_local.ipam, **fields)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: plugin("ADD", conf, netns=pod), range(4)))
    (winner,) = [answer for answer in answers if answer.status == 0]
    for answer in answers:
        if answer is not winner:
            answer.error(101)
    plugin("CHECK", conf | {"prevResult": winner.document}, netns=pod).ok()
    assert len(host_local.leases()) == 1
    plugin("DEL", conf, netns=pod).ok()
    assert (list(pod.links()), host_local.leases(), plugin.leftovers()) == (["lo"], [], [])


def test_item_28_link_first(plugin: Plugin, pod: Netns, fake: FakeIpam) -> None:
    """With "addressing": "link", the delegate finds the link in the pod at ADD, and at DEL still."""
    look = 'nsenter --net="$CNI_NETNS" ip link show up dev net1 >> links || true'
    fake.write(ADD=f"{look}; answer", DEL=look)
    for addressing, seen in (("guest", 0), ("link", 2)):
        conf = config(source=NIC, ipam=fake.config, addressing=addressing)
        plugin("ADD", conf, netns=pod).ok()
        plugin("DEL", conf, netns=pod).ok()
        assert (fake.seen / "links").read_text().count("net1@") == seen


def test_item_28_del_after_failed_add(plugin: Plugin, pod: Netns, fake: FakeIpam) -> None:
    """DEL follows a failed ADD, and has nothing to do but to ask the delegate once more."""
    fake.write(ADD="exit 1")
    conf = config(source=NIC, ipam=fake.config)
    plugin("ADD", conf, netns=pod).error(109)
    answer = plugin("DEL", conf, netns=pod)
    assert (answer.status, answer.stdout) == (0, b"")
    assert fake.log() == ["ADD c1 net1", "DEL c1 net1", "DEL c1 net1"]
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])
