"""The reconciler and attachments on virtual functions."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from cni.agent.cgroups import Cgroups
from cni.agent.metrics import Registry
from cni.agent.reconcile.runner import Reconciler
from cni.attach.call import Node
from cni.config import policy
from cni.state.store import Store
from lab.process import run
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.plugin import Response
    from lab.hw import Root
    from lab.wire import Netns
    from tests.hw.nic import Nic
    from tests.runner import Plugin


def _answer(asked: object) -> Response:
    raise AssertionError(asked)  # nothing is pending


def _reconcile(plugin: Plugin) -> None:
    """One whole run."""
    node = Node(Store(plugin.state), lambda: policy.load(plugin.policy), delegate_seconds=30.0)
    reconciler = Reconciler(node, _answer, Cgroups("/sys/fs/cgroup"), Registry(), seconds=3600.0)
    reconciler.start()
    reconciler.stop(60.0)


def test_an_attachment_without_a_record_is_adopted_with_its_function(
    bare: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    plugin.policy.write_text("interfaces: [{name: fast, source: {dev: [pf1, pf0]}, type: sr-iov}]")
    bare.make_vfs(2)
    before = bare.state()
    pod = pods()
    plugin("ADD", config(interface="fast"), netns=pod).ok()
    for folder in ("attachments", "ifindex", "vf"):
        shutil.rmtree(plugin.state / folder)
    store = Store(plugin.state)
    store.prepare()
    _reconcile(plugin)
    (record,) = store.records()
    assert (record.interface, record.source, record.mode) == ("fast", "pf0", "bridge")
    assert record.vf
    assert (record.vf.number, record.vf.pci) == (0, bare.pci(0))
    assert dict(store.functions_held()) == {bare.pci(0): record.id}
    plugin("DEL", config(), netns=pod).ok()
    assert plugin.leftovers() == []
    # The MAC stays: what it was before, nobody knows.
    changed = [line for line in bare.changed_since(before) if " address " not in line]
    assert changed == []


def test_an_attachment_whose_pod_is_gone_gives_its_function_back(
    bare: Nic, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    plugin.policy.write_text("interfaces: [{name: fast, source: {dev: pf0}, type: sr-iov}]")
    bare.make_vfs(2)
    before = bare.state()
    pod = pods()
    plugin("ADD", config(interface="fast"), netns=pod).ok()
    pod.close()

    def ended() -> bool:
        _reconcile(plugin)
        return plugin.leftovers() == []

    until(ended, "the attachment to end: the kernel ends a namespace some time after its last user")
    assert bare.changed_since(before) == []


def test_a_vlan_device_goes_when_nobody_remembers_whom_it_was_for(
    node: Root, plugin: Plugin, pods: Callable[[], Netns]
) -> None:
    before = set(node.links())
    pod = pods()
    plugin("ADD", config(source="pf1", vlan=100), netns=pod).ok()
    (made,) = set(node.links()) - before
    run(["ip", "link", "add", "link", "pf1", "name", f"{made}1", "type", "vlan", "id", "1001"])  # not marked
    try:
        for folder in ("attachments", "ifindex"):
            shutil.rmtree(plugin.state / folder)
        pod.ip("link set net1 alias x")  # no record can be made of it
        _reconcile(plugin)
        assert set(node.links()) - before == {made, f"{made}1"}, "a guest's wire was cut"
        pod.ip("link delete net1")
        _reconcile(plugin)
        assert set(node.links()) - before == {f"{made}1"}
    finally:
        run(["ip", "link", "delete", f"{made}1"])
    assert plugin.leftovers() == []
