"""What KubeVirt and Multus read of an attachment: the link's MAC and MTU, the CNI result.

virt-launcher takes the MTU of the link, and its MAC where the VM's spec has none; Multus makes of the result the
annotation network-status, which the VM's status is filled from.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from lab.libvirt import ifname
from tests.kubevirt.conftest import LauncherPod

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lab.wire import Lab
    from tests.runner import Plugin

MAC = "02:00:00:00:00:07"
WAYS: dict[str, dict[str, Any]] = {
    "macvtap": {"deviceID": "dataplaneMvp3"},
    "tap on a bridge": {"interface": "lan", "device": "tap", "owner": 107, "group": 107},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_link_and_the_status_say_the_same(lab: Lab, plugin: Plugin, way: str) -> None:
    for number, (mac, mtu) in enumerate(product((None, MAC), (None, 1400))):
        pod = LauncherPod(plugin, lab.pod(f"pod{number}"), vm=f"vm{number}")
        result = pod.add("red", mac=mac, **WAYS[way], **({"mtu": mtu} if mtu else {}))
        link = pod.link("red")
        assert link["mtu"] == (mtu or 1500)
        assert mac in (None, link["address"])
        (status,) = network_status(result)
        assert status == {"interface": ifname("red"), "mac": link["address"], "mtu": link["mtu"], "ips": []}
        pod.request("DEL", "red", **WAYS[way]).ok()


def test_two_networks_are_two_entries(lab: Lab, plugin: Plugin) -> None:
    """Each network is an ADD of its own; the tap's port on the node's bridge is nobody's network."""
    pod = LauncherPod(plugin, lab.pod())
    results = [pod.add(network, **way) for network, way in zip(("red", "blue"), WAYS.values(), strict=True)]
    names = [status["interface"] for result in results for status in network_status(result)]
    assert names == [ifname("red"), ifname("blue")]
    assert len(results[1]["interfaces"]) == 2


def network_status(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A stand-in for Multus, which cannot be had here: an entry for each interface that is in a sandbox."""
    ips = [address["address"].partition("/")[0] for address in result.get("ips", ())]
    return [
        {"interface": each["name"], "mac": each["mac"], "mtu": each["mtu"], "ips": ips}
        for each in result["interfaces"]
        if each.get("sandbox")
    ]
