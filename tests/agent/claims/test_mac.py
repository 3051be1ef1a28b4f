"""The MAC of a claim's guest: by the pod's annotation, restricted by the policy, or from what survives."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cni.config.claim import NETWORKS
from tests.agent.claims.conftest import event, run, stop

if TYPE_CHECKING:
    from lab.wire import Lab
    from tests.agent.claims.conftest import Node
    from tests.unit.agent.nri.runtime import Plugin


def test_a_guest_gets_the_mac_of_the_pods_annotation(node: Node, lab: Lab, plugin: Plugin) -> None:
    """Which KubeVirt's enhancement 183 proposes. It replaces the claim's, and stays where only the hook attaches."""
    first, second, claim = lab.pod(), lab.pod(), node.prepare(mac="02:00:00:00:00:08")
    networks = [{"claimName": claim.name, "requestName": "nic", "macs": ["02:00:00:00:00:09"]}]
    created = event("RUN_POD_SANDBOX", first)
    created.pod.annotations[NETWORKS] = json.dumps(networks)
    assert plugin.call("StateChange", created).status.message == ""
    assert first.links()["net0"]["address"] == "02:00:00:00:00:09"
    stop(plugin, first)
    node.hook(claim, second).ok()
    assert second.links()["net0"]["address"] == "02:00:00:00:00:09"


def test_the_policy_has_the_last_word_on_a_mac_of_the_annotation(
    node: Node, lab: Lab, plugin: Plugin
) -> None:
    node.policy(mac={"derivedOnly": True})
    pod, claim = lab.pod(), node.prepare()
    created = event("RUN_POD_SANDBOX", pod)
    for text, words in (
        ('[{"claimName": "vm-nic", "requestName": "nic", "macs": ["02:00:00:00:00:09"]}]', "derivedOnly"),
        ('[{"claimName": "vm-nic", "requestName": "nic", "macs": ["x"]}]', "request nic: mac"),
        ("7", "annotation"),
    ):
        created.pod.annotations[NETWORKS] = text
        assert words in plugin.call("StateChange", created).status.message
    assert node.record(claim) is None


def test_the_vms_of_both_ends_of_a_migration_have_one_mac(node: Node, lab: Lab, plugin: Plugin) -> None:
    """Of two launcher pods of one VM, each with a claim of its own."""
    found = []
    for name in ("virt-launcher-vm-aaaaa", "virt-launcher-vm-bbbbb", "virt-launcher-another-ccccc"):
        pod, _ = lab.pod(), node.prepare(name)
        assert run(plugin, pod, name) == ""
        found.append(pod.links()["net0"]["address"])
        stop(plugin, pod, name)
    assert found[0] == found[1] != found[2]
