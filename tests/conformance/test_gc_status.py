"""Checklist items 24 to 26: GC by list and by network, STATUS with a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import BRIDGE, NIC
from tests.conformance.test_invocation import each_device
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Netns
    from tests.conformance.conftest import HostLocal
    from tests.fakeipam import FakeIpam
    from tests.runner import Plugin

KEY = "cni.dev/valid-attachments"


def _valid(*containers: str) -> dict[str, Any]:
    """As libcni sends it: under the name of an earlier draft, too."""
    listed = [{"containerID": container, "ifname": "net1"} for container in containers]
    return {KEY: listed, "cni.dev/attachments": listed}


@pytest.mark.parametrize(
    "keys", [{}, {KEY: None}, {"cni.dev/attachments": []}], ids=["absent", "null", "the old key"]
)
def test_item_24_no_list(plugin: Plugin, pod: Netns, fake: FakeIpam, keys: dict[str, Any]) -> None:
    """Without a list nothing is removed; the delegate is asked all the same, as any GC has to be forwarded."""
    conf = config(source=NIC, ipam=fake.config)
    plugin("ADD", conf, netns=pod).ok()
    kept = plugin.leftovers()
    plugin("GC", conf | keys, container="", ifname="").ok()
    assert list(pod.links()) == ["lo", "net1"]
    assert plugin.leftovers() == kept
    assert fake.log() == ["ADD c1 net1", "GC  "]


@each_device
def test_item_24_list(
    plugin: Plugin, pods: Callable[[], Netns], host_local: HostLocal, fields: dict[str, Any]
) -> None:
    """What is not in the list goes: link, host end, lease and state. What is in it stays."""
    conf = config(ipam=host_local.ipam, **fields)
    before = set(plugin.node.links())
    alive, stale = pods(), pods()
    plugin("ADD", conf, netns=alive, container="alive").ok()
    host = set(plugin.node.links())
    plugin("ADD", conf, netns=stale, container="stale").ok()
    plugin("GC", conf | _valid("alive", "unheard-of"), container="", ifname="").ok()
    assert (list(stale.links()), "net1" in alive.links()) == (["lo"], True)
    assert set(plugin.node.links()) == host
    assert host_local.leases() == ["10.9.0.2"]
    plugin("GC", conf | _valid(), container="", ifname="").ok()
    assert list(alive.links()) == ["lo"]
    assert set(plugin.node.links()) == before
    assert (host_local.leases(), plugin.leftovers()) == ([], [])


def test_item_24_ifname_counts(plugin: Plugin, pod: Netns) -> None:
    """An attachment is container and ifname: of one container, one can be valid and the other not."""
    for ifname in ("net1", "net2"):
        plugin("ADD", config(source=NIC), netns=pod, ifname=ifname).ok()
    plugin("GC", config(source=NIC, **_valid("c1"))).ok()
    assert list(pod.links()) == ["lo", "net1"]


def test_item_25_scope(plugin: Plugin, pod: Netns) -> None:
    """Only the network of that name."""
    plugin("ADD", config(source=NIC, name="other"), netns=pod).ok()
    kept = plugin.leftovers()
    answer = plugin("GC", config(source=NIC, **_valid()))
    assert (answer.status, answer.stdout) == (0, b"")
    assert list(pod.links()) == ["lo", "net1"]
    assert plugin.leftovers() == kept


def test_item_25_config_is_wrong(plugin: Plugin, pod: Netns) -> None:
    """A config that is not valid any more does not keep GC from its work."""
    plugin("ADD", config(source=NIC), netns=pod).ok()
    plugin("GC", config(source="eth99", mode="flat", modee=1, **_valid())).ok()
    assert list(pod.links()) == ["lo"]


def test_item_25_goes_on(plugin: Plugin, pods: Callable[[], Netns], fake: FakeIpam) -> None:
    """Past one attachment's error to the next and on to the delegate's GC; all errors are reported at the end."""
    broken = """[ "$CNI_CONTAINERID" != b ] || { echo '{"code": 125, "msg": "b is stuck"}'; exit 1; }"""
    fake.write(DEL=broken, GC="""echo '{"code": 126, "msg": "no GC here"}'; exit 1""")
    conf = config(source=NIC, ipam=fake.config)
    made = {container: pods() for container in "abc"}
    for container, pod in made.items():
        plugin("ADD", conf, netns=pod, container=container).ok()
    error = plugin("GC", conf | _valid(), container="", ifname="").error(125)
    assert "b is stuck" in error["msg"]
    assert "no GC here" in error["details"]
    assert [list(pod.links()) for pod in made.values()] == [["lo"]] * 3
    assert sorted(fake.log()[3:6]) == ["DEL a net1", "DEL b net1", "DEL c net1"]
    assert fake.log()[6:] == ["GC  "]
    assert [path for path in plugin.leftovers() if "/attachments/" in path]  # what is stuck is not forgotten
    fake.write()
    answer = plugin("GC", conf | _valid(), container="", ifname="")
    assert (answer.status, answer.stdout) == (0, b"")
    assert plugin.leftovers() == []


def test_item_25_forwarded(plugin: Plugin, fake: FakeIpam) -> None:
    """The delegate gets the very same document, list and all."""
    conf = config(source=NIC, ipam=fake.config, **_valid("c7"))
    plugin("GC", conf, container="", ifname="").ok()
    assert fake.log() == ["GC  "]
    assert b'"containerID": "c7"' in fake.stdin("GC")


@pytest.mark.parametrize(
    ("fields", "policy", "named"),
    [
        ({"source": "eth99"}, "", "eth99"),
        ({"source": "lo"}, "", "lo"),
        ({"interface": "dataplane"}, "", "dataplane"),
        ({"interface": "dataplane"}, "interfaces: {{\n", "interfaces.yaml"),
        ({"interface": "vf"}, "interfaces:\n- {name: vf, source: {dev: eth1}, type: sr-iov}\n", "sr-iov"),
        ({"interface": "q"}, "interfaces:\n- {name: q, source: {dev: eth1}, type: vmdq}\n", "vmdq"),
        ({"source": NIC, "mtu": 9000}, "", "9000"),
        ({"source": NIC, "ipam": {"type": "not-installed"}}, "", "not-installed"),
    ],
)
def test_item_26_reason(plugin: Plugin, fields: dict[str, Any], policy: str, named: str) -> None:
    """50, with the reason, where an ADD could only fail: source missing or unfit, policy, delegate."""
    if policy:
        plugin.policy.write_text(policy)
    assert named in plugin("STATUS", config(**fields)).error(50)["msg"]


def test_item_26_kubelet(plugin: Plugin) -> None:
    """A network whose device the kubelet allocates is ready, before there is a pod; but not with a broken policy."""
    plugin.policy.write_text(f"interfaces:\n- {{name: dataplane, source: {{dev: {NIC}}}}}\n")
    conf = config(mode="bridge")
    assert plugin("STATUS", conf).status == 0
    plugin.policy.write_text("interfaces: {{\n")
    assert str(plugin.policy) in plugin("STATUS", conf).error(50)["msg"]


def test_item_26_state(plugin: Plugin) -> None:
    """50 where no state can be kept."""
    plugin.state.write_text("in the way")
    assert str(plugin.state) in plugin("STATUS", config(source=NIC)).error(50)["msg"]


@pytest.mark.parametrize(
    "fields", [{"source": NIC}, {"source": BRIDGE}, {"device": "tap"}, {"interface": "full"}]
)
def test_item_26_ready(plugin: Plugin, pod: Netns, fields: dict[str, Any]) -> None:
    """Ready is silence; an interface whose capacity is used up is still ready."""
    if "interface" in fields:
        plugin.policy.write_text(
            f"interfaces:\n- {{name: full, source: {{dev: {NIC}}}, type: ethernet, capacity: 1}}\n"
        )
        plugin("ADD", config(**fields), netns=pod).ok()
    answer = plugin("STATUS", config(**fields))
    assert (answer.status, answer.stdout) == (0, b"")


def test_item_26_delegate(plugin: Plugin, fake: FakeIpam) -> None:
    """The delegate's STATUS is asked, and its error is ours."""
    fake.write(STATUS="""echo '{"code": 51, "msg": "few addresses"}'; exit 1""")
    error = plugin("STATUS", config(source=NIC, ipam=fake.config)).error(51)
    assert "few addresses" in error["msg"]


def test_item_26_add_does_not_depend(plugin: Plugin, pod: Netns, fake: FakeIpam) -> None:
    """ADD works while the delegate's STATUS fails, and never asks for it."""
    fake.write(STATUS="exit 1")
    conf = config(source=NIC, ipam=fake.config)
    assert plugin("STATUS", conf).status == 1
    plugin("ADD", conf, netns=pod).ok()
    assert [line.split()[0] for line in fake.log()] == ["STATUS", "ADD"]
