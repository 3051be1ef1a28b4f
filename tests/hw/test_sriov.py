"""Attachments of type sr-iov, by the installed executable on an emulated NIC: the life of a virtual function."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from cni.attach.call import Request
from cni.kernel import tapdev
from cni.plugin import handle
from cni.port import guard
from cni.state.record import Record
from cni.state.store import Store
from lab.frames import BROADCAST, Frame, collect, packet_socket, write_tap
from lab.process import run
from tests.hw.nic import PF0, PF1, killed
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.hw import Root
    from lab.wire import Netns
    from tests.hw.nic import Nic
    from tests.runner import Plugin

MAC = "02:00:00:00:00:31"


def _policy(plugin: Plugin, dev: str = "pf0", **entry: Any) -> None:
    lines = "".join(f"    {key}: {value}\n" for key, value in entry.items())
    plugin.policy.write_text(
        f"interfaces:\n  - name: fast\n    source: {{dev: {dev}}}\n    type: sr-iov\n{lines}"
    )


def _config(**fields: Any) -> dict[str, Any]:
    return config(interface="fast", **fields)


def _record(plugin: Plugin, container: str = "c1") -> Record:
    (record,) = [each for each in Store(plugin.state).records() if each.container_id == container]
    return record


@pytest.fixture
def two(node: Root, plugin: Plugin) -> Iterator[Nic]:
    """A NIC with two VFs, and a policy that names it. Whatever was attached, they must be as they were."""
    nic = PF0
    if nic.count() != 2:
        nic.make_vfs(0)
        nic.make_vfs(2)
        node.wait_until_up(nic.pf)
    before = nic.state()
    _policy(plugin)
    yield nic
    for record in list(Store(plugin.state).records()):
        plugin("DEL", _config(), container=record.container_id, netns=record.netns).ok()
    assert plugin.leftovers() == []
    if nic.count() == 2:
        assert nic.changed_since(before) == []


def test_a_claims_device_is_its_function_or_another_if_that_is_taken(
    two: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    for container, expected in (("claim1", 1), ("claim2", 0)):
        env = plugin.environment("ADD", pods(), container)
        request = Request(env, json.dumps(_config()).encode(), function=two.pci(1))
        assert handle(request, plugin.given()).status == 0
        function = _record(plugin, container).vf
        assert function
        assert (function.number, function.pci) == (expected, two.pci(expected))


def test_an_attachment_has_a_function_and_gives_it_back(
    node: Root, two: Nic, plugin: Plugin, executable: Plugin, pods: Callable[[], Netns]
) -> None:
    pod = pods()
    answer = executable("ADD", _config(mac=MAC), netns=pod).ok()
    assert answer["interfaces"] == [{"name": "net1", "mac": MAC, "mtu": 1500, "sandbox": str(pod.path)}]
    link = pod.links()["net1"]
    assert (link["linkinfo"]["info_data"]["mode"], link["address"]) == ("passthru", MAC)
    vf = two.netdev(0)
    node.wait_until_up(vf)  # its driver sees the carrier a moment after it was set up
    assert {
        f"vf 0 address {MAC}",
        f"{vf} address {MAC}",
        f"{vf} flags ['ALLMULTI', 'BROADCAST', 'LOWER_UP', 'MULTICAST', 'NOARP', 'UP']",
        f"{vf} disable_ipv6 1",
        f"{vf} ifalias vmtap/wire/c1/net1",
    } <= set(two.state())
    assert _record(plugin).source == "pf0"
    executable("CHECK", _config(mac=MAC, prevResult=answer), netns=pod).ok()
    executable("DEL", _config(mac=MAC), netns=pod).ok()


def test_frames_pass_between_functions_to_the_pf_and_to_the_wire(
    node: Root, two: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    fds = {}
    macs = {}
    for container in ("c1", "c2"):
        pod = pods()
        answer = plugin("ADD", _config(), netns=pod, container=container).ok()
        macs[container] = answer["interfaces"][0]["mac"]
        pod.wait_until_up("net1")
        with pod.path.open() as namespace:
            (fds[container],) = tapdev.open_queues(namespace.fileno(), _record(plugin, container), 1)
    try:
        with packet_socket(node, two.pf) as pf, packet_socket(node, two.wire) as wire:
            write_tap(fds["c1"], Frame(macs["c2"], macs["c1"], "for c2"))
            write_tap(fds["c1"], Frame(BROADCAST, macs["c1"], "for all"))
            got = collect({"c2": fds["c2"], "pf": pf, "wire": wire}, until="for all")
            assert {port: [each.token for each in frames] for port, frames in got.items()} == {
                "c2": ["for c2"],
                "pf": [],
                "wire": [],
            }
            wire.send(Frame(macs["c1"], "02:00:00:00:00:99", "from the wire").pack())
            collect({"c1": fds["c1"]}, until="from the wire")
    finally:
        for fd in fds.values():
            os.close(fd)


def test_all_taken_is_an_error_with_the_counts(
    node: Root, two: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    run(["ip", "address", "add", "10.99.0.1/24", "dev", two.netdev(0)])
    plugin("ADD", _config(), netns=pods()).ok()
    assert _record(plugin).vf is not None
    answer = plugin("ADD", _config(), netns=pods(), container="c2").error(11)
    assert "of 2, 1 in use by the host, 1 attached" in answer["msg"]
    assert len(plugin.leftovers()) == 3  # the first one's record, index and VF
    run(["ip", "address", "flush", "dev", two.netdev(0)])


def test_a_function_that_the_pf_has_tied_to_a_mac_is_bound_anew(
    node: Root, two: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    """Its driver takes no MAC by itself then; after DEL it has the old one, and is tied to it, as before."""
    run(["ip", "link", "set", "pf0", "vf", "0", "mac", "02:00:00:00:00:41"])
    two.rebind(0)
    before = two.state()
    plugin("ADD", _config(mac=MAC), netns=pods()).ok()
    assert {f"vf 0 address {MAC}", f"{two.netdev(0)} address {MAC}"} <= set(two.state())
    plugin("DEL", _config(mac=MAC)).ok()
    assert two.changed_since(before) == []
    refused = run(["ip", "link", "set", two.netdev(0), "address", MAC], check=False)
    assert refused.returncode != 0
    two.make_vfs(0)


def test_what_the_policy_and_the_config_say_is_set_and_taken_back(
    two: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    _policy(plugin, spoofchk="false", trust="true", maxTxRate=100, vlans="[100, 200]")
    plugin("ADD", _config(vlan=200, vlanPriority=3), netns=pods()).ok()
    admin = two.settings()[0]
    assert (admin["vlan_list"], admin["spoofchk"], admin["trust"]) == ([{"vlan": 200, "qos": 3}], False, True)
    assert admin["rate"]["max_tx"] == 100
    plugin("ADD", _config(), netns=pods(), container="c2").ok()
    assert two.settings()[1]["vlan_list"] == [{"vlan": 100}]
    plugin("ADD", _config(vlan=300), netns=pods(), container="c3").error(7)


def test_a_port_is_in_force_in_the_nic_and_at_the_macvtap(
    node: Root, two: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    """The NIC refuses other MACs by its own spoofchk, and the filters at the macvtap do before that."""
    run(["ip", "link", "set", two.pf, "vf", "0", "spoofchk", "off"])
    _policy(plugin, port="{macSpoofCheck: true, trunk: [], rate: {out: 100Mbit, in: 1Gbit}}")
    pod = pods()
    answer = plugin("ADD", _config(), netns=pod).ok()
    mac = answer["interfaces"][0]["mac"]
    assert two.settings()[0]["spoofchk"] is True
    assert "rate 100Mbit" in pod.run(["tc", "qdisc", "show", "dev", "net1"]).stdout
    pod.wait_until_up("net1")
    with pod.path.open() as namespace:
        (fd,) = tapdev.open_queues(namespace.fileno(), _record(plugin), 1)
    try:
        with packet_socket(node, two.wire) as wire:
            write_tap(fd, Frame(BROADCAST, "02:00:00:00:00:99", "spoofed"))
            write_tap(fd, Frame(BROADCAST, mac, "end"))
            assert collect({"wire": wire}, until="end") == {"wire": []}
    finally:
        os.close(fd)
    assert pod.call(lambda: guard.refused(_record(plugin)))["source-mac"] == 1
    plugin("CHECK", _config(prevResult=answer), netns=pod).ok()
    plugin("DEL", _config(), netns=pod).ok()
    assert two.settings()[0]["spoofchk"] is False
    run(["ip", "link", "set", two.pf, "vf", "0", "spoofchk", "on"])


@dataclass(frozen=True)
class Refusal:
    """What an entry and a config ask for, and what they hear."""

    code: int
    said: str
    entry: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(
            7,
            "vepa is refused: the driver of 'pf0' cannot put its embedded switch",
            fields={"mode": "vepa"},
        ),
        Refusal(7, "no NIC's embedded switch", fields={"mode": "pepa"}),
        Refusal(100, "VF 0 of 'pf0' cannot have vlan", fields={"vlan": 100, "vlanProtocol": "802.1ad"}),
        Refusal(100, "cannot have link_state", {"linkState": "enable"}),
        Refusal(100, "cannot have rate", {"minTxRate": 10}),
        Refusal(7, "it is no SR-IOV PF", {"dev": "wire0"}),
        Refusal(7, "VF 2 of pf0 was allocated, and there are 2", fields={"deviceID": "fastMvp2"}),
    ],
    ids=lambda refusal: refusal.said,
)
def test_what_the_nic_cannot_do_is_refused_and_nothing_is_left(
    two: Nic, plugin: Plugin, pods: Callable[[], Netns], refusal: Refusal
) -> None:
    before = two.state()
    _policy(plugin, **refusal.entry)
    answer = plugin("ADD", _config(**refusal.fields), netns=pods()).error(refusal.code)
    assert refusal.said in answer["msg"]
    assert plugin.leftovers() == []
    assert two.changed_since(before) == []


def test_the_device_plugins_choice_counts(two: Nic, plugin: Plugin, pods: Callable[[], Netns]) -> None:
    plugin("ADD", _config(deviceID="fastMvp1"), netns=pods()).ok()
    function = _record(plugin).vf
    assert function is not None
    assert function.number == 1
    plugin("ADD", _config(), netns=pods(), container="c2").ok()
    answer = plugin("ADD", _config(deviceID="fastMvp0"), netns=pods(), container="c3").error(11)
    assert answer["msg"] == "VF 0 of 'pf0', which was allocated, is attached"


def test_functions_are_made_where_the_entry_says_how_many(
    bare: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    _policy(plugin)
    assert "has 0 of 7 VFs" in plugin("ADD", _config(), netns=pods()).error(11)["msg"]
    _policy(plugin, vfs=8)
    assert "it can have 7 at most" in plugin("ADD", _config(), netns=pods()).error(7)["msg"]
    _policy(plugin, vfs=1, maxTxRate=100)
    plugin("ADD", _config(), netns=pods()).ok()
    assert bare.count() == 1
    plugin("DEL", _config()).ok()
    assert plugin.leftovers() == []


def test_a_pool_goes_on_where_the_first_is_full(bare: Nic, plugin: Plugin, pods: Callable[[], Netns]) -> None:
    _policy(plugin, "[pf0, pf1]", vfs=1)
    for container, pf in (("c1", "pf0"), ("c2", "pf1")):
        plugin("ADD", _config(), netns=pods(), container=container).ok()
        assert _record(plugin, container).source == pf
    answer = plugin("ADD", _config(), netns=pods(), container="c3").error(11)
    assert "no VF of pf0, pf1 is free: of 2, 2 attached" in answer["msg"]
    for container in ("c1", "c2"):
        plugin("DEL", _config(), container=container).ok()
    PF1.make_vfs(0)


def test_adds_at_once_have_a_function_each(two: Nic, plugin: Plugin, pods: Callable[[], Netns]) -> None:
    with ThreadPoolExecutor() as threads:
        answers = list(
            threads.map(
                lambda number: plugin("ADD", _config(), netns=pods(), container=f"c{number}"), range(3)
            )
        )
    assert sorted(each.status for each in answers) == [0, 0, 1]
    records = list(Store(plugin.state).records())
    assert {each.vf.number for each in records if each.vf} == {0, 1}


def test_a_function_that_is_pulled_away_under_a_pod_is_let_go(
    two: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    pod = pods()
    answer = plugin("ADD", _config(), netns=pod).ok()
    two.make_vfs(0)
    assert "net1" not in pod.links()
    plugin("CHECK", _config(prevResult=answer), netns=pod).error(108)
    two.make_vfs(1)  # another VF of the same address, which is none of ours
    before = two.state()
    plugin("DEL", _config(), netns=pod).ok()
    assert plugin.leftovers() == []
    assert two.changed_since(before) == []


@pytest.fixture(scope="module")
def tied(node: Root) -> Iterator[Nic]:
    """A NIC with two VFs, the first tied to a MAC by its PF, so that each ADD and DEL binds its driver anew."""
    PF0.make_vfs(0)
    PF0.make_vfs(2)
    run(["ip", "link", "set", "pf0", "vf", "0", "mac", "02:00:00:00:00:42"])
    PF0.rebind(0)
    yield PF0
    PF0.make_vfs(0)


@pytest.mark.parametrize(
    "kill",
    [
        ("cni.kernel.vf.change", 1),
        ("cni.lower.sriov._write", 1),
        ("cni.lower.sriov._write", 2),
        ("cni.kernel.ipv6.keep_out", 1),
        ("cni.kernel.macvtap.create", 1),
        ("cni.kernel.macvtap.bring_up", 1),
    ],
    ids=lambda kill: f"{kill[0]} {kill[1]}",
)
def test_whenever_an_add_is_killed_the_function_comes_back_as_it_was(
    tied: Nic, plugin: Plugin, pods: Callable[[], Netns], kill: tuple[str, int]
) -> None:
    _policy(plugin)
    before = tied.state()
    pod = pods()
    conf = _config(mac=MAC, vlan=100)
    killed(lambda: plugin("ADD", conf, netns=pod), *kill)
    plugin("DEL", conf, netns=pod).ok()
    assert plugin.leftovers() == []
    assert tied.changed_since(before) == []


def test_a_killed_add_can_be_repeated_and_a_killed_del_too(
    tied: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    _policy(plugin)
    before = tied.state()
    pod = pods()
    conf = _config(mac=MAC, vlan=100)
    killed(lambda: plugin("ADD", conf, netns=pod), "cni.lower.sriov._write", 1)
    plugin("ADD", conf, netns=pod).ok()
    assert tied.settings()[0]["vlan_list"] == [{"vlan": 100}]
    killed(lambda: plugin("DEL", conf, netns=pod), "cni.lower.sriov._write", 1)
    plugin("DEL", conf, netns=pod).ok()
    assert plugin.leftovers() == []
    assert tied.changed_since(before) == []


def test_a_del_without_a_record_lets_the_function_go(
    bare: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    """What it was is lost with the record, and so it is as a driver leaves one."""
    bare.make_vfs(1)
    _policy(plugin)
    pod = pods()
    plugin("ADD", _config(), netns=pod).ok()
    shutil.rmtree(plugin.state)
    assert "1 attached" in plugin("ADD", _config(), netns=pods(), container="c2").error(11)["msg"]
    plugin("DEL", _config(), netns=pod).ok()
    vf = bare.netdev(0)
    assert {f"{vf} flags ['BROADCAST', 'MULTICAST']", f"{vf} disable_ipv6 0", f"{vf} ifalias None"} <= set(
        bare.state()
    )
    plugin("ADD", _config(), netns=pods(), container="c2").ok()
    plugin("DEL", _config(), container="c2").ok()
