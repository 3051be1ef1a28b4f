"""Checklist items 1 to 7: how the plugin is called, what it prints, what its errors say."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import BRIDGE, BRIDGE_UPLINK, NIC
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab, Netns
    from tests.fakeipam import FakeIpam
    from tests.runner import Plugin

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
DEVICES = {
    "macvtap": {"source": NIC},
    "tap-on-bridge": {"source": BRIDGE, "device": "tap"},
    "plain-tap": {"device": "tap"},
}
each_device = pytest.mark.parametrize("fields", [pytest.param(DEVICES[key], id=key) for key in DEVICES])
ATTACHMENT = ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")
REQUIRED = {
    "ADD": ATTACHMENT,
    "CHECK": ATTACHMENT,
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "GC": ("CNI_PATH",),
}


@pytest.mark.parametrize("command", [None, "", "add", "DELETE", "ADD "])
def test_item_01_command(plugin: Plugin, command: str | None) -> None:
    """CNI_COMMAND missing, empty or unknown is error 4 and is named."""
    error = plugin("ADD", config(source=NIC), env={"CNI_COMMAND": command}).error(4)
    assert "CNI_COMMAND" in error["msg"]
    assert repr(command or "") in error["msg"]


def test_item_01_about(plugin: Plugin) -> None:
    """With no CNI_ variable at all it says on stderr what it is, and exits with 0."""
    none = {name: None for name in plugin.environment("", "") if name.startswith("CNI_")}
    answer = plugin("", b"", env=none)
    assert (answer.status, answer.stdout) == (0, b"")
    assert ", ".join(VERSIONS) in answer.stderr


@pytest.mark.parametrize("absent", [None, ""], ids=["unset", "empty"])
@pytest.mark.parametrize("command", REQUIRED)
def test_item_02_all_that_is_missing(plugin: Plugin, command: str, absent: str | None) -> None:
    """What a command needs and is unset or empty is listed, all of it, in error 4."""
    variables = (*ATTACHMENT, "CNI_PATH")
    error = plugin(command, config(source=NIC), env=dict.fromkeys(variables, absent)).error(4)
    assert [name for name in variables if name in error["msg"]] == list(REQUIRED[command])


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, names in REQUIRED.items() for name in names]
)
def test_item_02_one_that_is_missing(plugin: Plugin, command: str, name: str) -> None:
    """Each of them is needed."""
    answer = plugin(command, config(source=NIC), netns="/nowhere", env={name: ""})
    assert f"{command} needs {name} " in answer.error(4)["msg"]


@pytest.mark.parametrize("command", ["STATUS", "VERSION"])
def test_item_02_nothing_needed(plugin: Plugin, command: str) -> None:
    """STATUS and VERSION need nothing."""
    variables = (*ATTACHMENT, "CNI_PATH", "CNI_ARGS")
    assert plugin(command, config(source=NIC), env=dict.fromkeys(variables)).status == 0


@pytest.mark.parametrize(
    ("command", "container"),
    [
        *(("ADD", bad) for bad in ("-a", ".a", "_a", "a/b", "a\n", "a b", "ä")),
        ("CHECK", "../a"),
    ],
)
def test_item_03_container_id(plugin: Plugin, command: str, container: str) -> None:
    """A container id that is not one, whole, is error 4 before anything is looked at."""
    error = plugin(command, config(source=NIC), netns="/nowhere", container=container).error(4)
    assert f"CNI_CONTAINERID {container!r}" in error["msg"]


@pytest.mark.parametrize(
    ("command", "ifname"),
    [
        *(("ADD", bad) for bad in (".", "..", "a/b", "a:b", "a b", "a\n", "a\u00a0b", "x" * 16, "é" * 8)),
        ("CHECK", "../a"),
    ],
)
def test_item_03_ifname(plugin: Plugin, command: str, ifname: str) -> None:
    """An interface name that the kernel would not have is error 4 before anything is looked at."""
    error = plugin(command, config(source=NIC), netns="/nowhere", ifname=ifname).error(4)
    assert f"CNI_IFNAME {ifname!r}" in error["msg"]


@pytest.mark.parametrize("names", [{"container": "a\n"}, {"ifname": "net%d"}, {"ifname": "a/b"}])
def test_item_03_del(plugin: Plugin, pod: Netns, names: dict[str, Any]) -> None:
    """A DEL with an id or a name that ADD refuses succeeds: there is nothing to end, and the pod must not stay."""
    plugin("ADD", config(source=NIC), netns=pod, **names).error(4)
    answer = plugin("DEL", config(source=NIC), netns=pod, **names)
    assert (answer.status, answer.stdout) == (0, b"")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("ADD", bad) for bad in ("", "-net", ".", "a/b", "net\n")),
        ("GC", "../a"),
        ("STATUS", "é"),
    ],
)
def test_item_03_network_name(plugin: Plugin, command: str, name: str) -> None:
    """A network name that is not one is error 7 before anything is looked at."""
    error = plugin(command, config(source=NIC, name=name), netns="/nowhere").error(7)
    assert error["msg"].startswith("name: ")


@pytest.mark.parametrize(
    ("container", "ifname", "name"),
    [("0", "x" * 15, "0"), ("A_.-9", "é" * 7, "A_.-9"), ("c" * 200, "-", "n" * 200)],
)
def test_item_03_accepted(plugin: Plugin, pod: Netns, container: str, ifname: str, name: str) -> None:
    """The longest and oddest names that are allowed do work, and DEL finds what they named."""
    conf = config(source=NIC, name=name)
    plugin("ADD", conf, netns=pod, container=container, ifname=ifname).ok()
    assert list(pod.links()) == ["lo", ifname]
    plugin("DEL", conf, netns=pod, container=container, ifname=ifname).ok()
    assert list(pod.links()) == ["lo"]
    assert plugin.leftovers() == []


@pytest.mark.parametrize("command", ["GC", "STATUS"])
def test_item_04_empty_attachment(plugin: Plugin, command: str) -> None:
    """GC and STATUS come with empty attachment variables, and go well."""
    answer = plugin(command, config(source=NIC), container="", ifname="", netns="")
    assert (answer.status, answer.stdout) == (0, b"")


@each_device
def test_item_05_output(plugin: Plugin, pod: Netns, fake: FakeIpam, fields: dict[str, Any]) -> None:
    """One JSON document alone on stdout for ADD, nothing for the others, status 0; a delegate's noise is on stderr."""
    conf = config(ipam=fake.config, **fields)
    added = plugin("ADD", conf, netns=pod)
    result = added.ok()
    assert result["cniVersion"] == "1.1.0"
    assert "the delegate was asked to ADD" in added.stderr
    for command, more in (
        ("CHECK", {"prevResult": result}),
        ("STATUS", {}),
        ("GC", {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "net1"}]}),
        ("DEL", {"prevResult": result}),
    ):
        answer = plugin(command, conf | more, netns=pod)
        assert (answer.status, answer.stdout) == (0, b""), command
        assert f"the delegate was asked to {command}" in answer.stderr


@pytest.mark.parametrize("command", ["ADD", "CHECK", "GC", "STATUS"])
def test_item_05_errors(plugin: Plugin, command: str) -> None:
    """An error is one JSON object on stdout, a status that is not 0, and a line for people on stderr."""
    answer = plugin(command, b"{", netns="/nowhere")
    assert answer.status == 1
    error = answer.error(6)
    assert answer.stdout.count(b"\n") == 1
    assert error["msg"] in answer.stderr


@pytest.mark.parametrize("version", [*VERSIONS, "9.9.9"])
def test_item_06_keys(plugin: Plugin, version: str) -> None:
    """An error has cniVersion, code, msg and, if there is more to say, details: in the version that was asked for."""
    error = plugin("ADD", config(mode="flat", mtu=1, cniVersion=version), netns="/nowhere").document
    known = version in VERSIONS
    assert list(error) == ["cniVersion", "code", "msg", "details"][: 4 if known else 3]
    assert error["cniVersion"] == (version if known else "1.1.0")
    assert type(error["code"]) is int
    assert type(error["msg"]) is str
    if known:
        assert type(error["details"]) is str


@pytest.mark.parametrize(
    ("code", "fields", "named"),
    [
        (1, {"cniVersion": "9.9.9"}, "9.9.9"),
        (2, {"modee": "vepa"}, 'modee: unknown key, its value is "vepa"'),
        (7, {"mode": "flat"}, '"flat"'),
        (7, {"mtu": 9000}, "1500"),
        (7, {"source": "lo"}, "lo"),
        (7, {"interface": "dataplane", "source": None}, "dataplane"),
        (101, {"ifname": "lo"}, "'lo'"),
        (102, {"source": BRIDGE_UPLINK}, BRIDGE),
        (104, {"source": "eth99"}, "eth99"),
    ],
)
def test_item_07_codes(plugin: Plugin, pod: Netns, code: int, fields: dict[str, Any], named: str) -> None:
    """Each cause has its code, and the message names the culprit; nothing is left of such an ADD."""
    fields = {"source": NIC} | fields
    ifname = fields.pop("ifname", "net1")
    conf = config(**{key: value for key, value in fields.items() if value is not None})
    error = plugin("ADD", conf, netns=pod, ifname=ifname).error(code)
    assert named in error["msg"]
    assert list(pod.links()) == ["lo"]
    assert plugin.leftovers() == []


def test_item_07_mac_in_use(plugin: Plugin, pods: Callable[[], Netns]) -> None:
    """103: another attachment on the source has the MAC, and is named: in Kubernetes by its pod."""
    one, other = pods(), pods()
    conf = config(source=NIC, mac="02:00:00:00:0a:01")
    plugin("ADD", conf, netns=one, container="first").ok()
    error = plugin("ADD", conf, netns=other, container="second").error(103)
    assert "net1 of container first" in error["msg"]
    plugin("DEL", conf, netns=one, container="first").ok()
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=virt-launcher-db-x7k2p"
    plugin("ADD", conf, netns=one, container="first", args=args).ok()
    error = plugin("ADD", conf, netns=other, container="second").error(103)
    assert "by net1 of pod prod/virt-launcher-db-x7k2p (VM db) in network" in error["msg"]
    assert list(other.links()) == ["lo"]
    assert list(one.links()) == ["lo", "net1"]


def test_item_07_state(plugin: Plugin, pod: Netns) -> None:
    """5: the state cannot be kept, so nothing is made."""
    plugin.state.write_text("in the way")
    error = plugin("ADD", config(source=NIC), netns=pod).error(5)
    assert str(plugin.state) in error["msg"]
    assert list(pod.links()) == ["lo"]


@pytest.mark.parametrize("kind", ["missing", "file", "other namespace"])
def test_item_07_netns(plugin: Plugin, kind: str) -> None:
    """8: CNI_NETNS is not a network namespace. (3 would tell the runtime that it need not DEL: it is never used.)"""
    file = plugin.policy.with_name("file")
    file.write_text("")
    path = {"missing": "/nowhere", "file": str(file), "other namespace": "/proc/self/ns/uts"}[kind]
    assert path in plugin("ADD", config(source=NIC), netns=path).error(8)["msg"]


def test_item_07_terminated(plugin: Plugin, pod: Netns, fake: FakeIpam) -> None:
    """11: told to end by SIGTERM, it undoes what it had begun, its delegate's part too, and says try again."""
    fifo = fake.seen / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    fake.write(ADD=f"echo asked > {fifo}; exec sleep 60")
    process = subprocess.Popen(
        plugin.argv(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=plugin.environment("ADD", pod),
    )
    with process:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(config(source=NIC, ipam=fake.config)).encode())
        process.stdin.close()
        assert fifo.read_text() == "asked\n"  # opens when the delegate does
        process.send_signal(signal.SIGTERM)
        assert json.loads(process.stdout.read())["code"] == 11
    assert process.returncode == 1
    assert fake.log() == ["ADD c1 net1", "DEL c1 net1"]
    assert list(pod.links()) == ["lo"]
    assert plugin.leftovers() == []


def test_item_07_delegates_unknown_container(plugin: Plugin, pod: Netns, fake: FakeIpam) -> None:
    """A delegate's 3 does not become ours: the runtime would then not DEL what its failed DEL has left."""
    failure = """echo '{"code": 3, "msg": "who?"}'; exit 1"""
    fake.write(ADD=failure, DEL=failure)
    error = plugin("ADD", config(source=NIC, ipam=fake.config), netns=pod).error(109)
    assert "who?" in error["msg"]


def test_item_07_status(plugin: Plugin, lab: Lab) -> None:
    """50: STATUS knows that no ADD can work."""
    assert "eth99" in plugin("STATUS", config(source="eth99")).error(50)["msg"]
