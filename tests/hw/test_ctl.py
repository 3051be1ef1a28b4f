"""What vmtapctl and the metrics say of virtual functions of an emulated NIC."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cni.agent import metrics, node_metrics
from cni.config.policy import load
from cni.ctl import locations, render, snapshot, virtual_functions
from cni.state.store import Store
from lab.process import run
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Netns
    from tests.hw.nic import Nic
    from tests.runner import Plugin


def test_what_is_said_of_a_nic_and_its_functions(
    bare: Nic, plugin: Plugin, pods: Callable[[], Netns], capsys: pytest.CaptureFixture[str]
) -> None:
    plugin.policy.write_text(
        "interfaces: [{name: fast, source: {dev: [pf0, pf1]}, type: sr-iov, modes: [bridge, vepa]}]"
    )
    found = locations.load(run=str(plugin.state), policy=str(plugin.policy), file=None)
    bare.make_vfs(2)
    plugin("ADD", config(interface="fast", mode="bridge", vlan=100), netns=pods()).ok()

    taken = snapshot.take(found)
    pf0, pf1 = taken.sources
    (entry,) = pf0.entries
    assert [(each.number, each.pci, each.link, each.driver) for each in pf0.functions] == [
        (number, bare.pci(number), bare.netdev(number), "igbvf") for number in range(2)
    ]
    assert (pf0.most, pf0.switch_mode, pf1.most, pf1.functions) == (7, None, 7, ())
    assert (
        virtual_functions.summary(taken, pf0)
        == "2 of 7 VFs made, 1 free, embedded switch without a mode to set"
    )
    (vepa,) = virtual_functions.faults(taken, pf0, entry)
    assert "cannot set the mode" in vepa[1]
    assert "0 of 7 VFs are made" in next(virtual_functions.faults(taken, pf1, entry))[1]
    render.say(render.tree(taken))
    said = capsys.readouterr().out
    assert f"VF 0  {bare.netdev(0)}  {bare.pci(0)}" in said
    assert "VLAN 100" in said

    registry, store = metrics.Registry(), Store(plugin.state)
    node_metrics.declare(registry, store, lambda: load(plugin.policy), lambda: True)
    text = registry.render(lambda name, error: pytest.fail(f"{name}: {error}")).decode()
    for state, count in (("attached", 1), ("free", 1), ("other", 0), ("unmade", 5)):
        assert f'vmtap_virtual_functions{{source="pf0",state="{state}"}} {count}\n' in text
    assert 'vmtap_virtual_functions{source="pf1",state="unmade"} 7\n' in text

    (attached,) = taken.attachments
    assert list(virtual_functions.changes(attached)) == []
    run(["ip", "link", "set", "pf0", "vf", "0", "vlan", "200"])
    ((severity, what, _),) = virtual_functions.changes(attached)
    assert severity == "warning"
    assert "VF 0 of pf0: vlan is [200, 0, 33024], and ADD made it [100, 0, 33024]" in what
    run(["ip", "link", "set", "pf0", "vf", "0", "vlan", "100"])
    plugin("DEL", config()).ok()
    assert plugin.leftovers() == []
