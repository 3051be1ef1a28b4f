"""What a node's kernel may lack, or have in use: drivers as modules, and the links of others on the source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cni import spec
from lab.process import run
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.hw import Root
    from lab.wire import Netns
    from tests.runner import Plugin

_INIT = "/proc/1/root"
"""The initramfs: it has busybox and the modules."""


@pytest.mark.parametrize("device", ["macvtap", "tap"])
def test_a_driver_that_is_not_loaded(
    node: Root, plugin: Plugin, pods: Callable[[], Netns], device: str
) -> None:
    """And cannot be: the machine's root has no modules of this kernel."""
    module = "macvtap" if device == "macvtap" else "tun"
    fields: dict[str, Any] = {"source": "wire1"} if device == "macvtap" else {"device": "tap"}
    run([f"{_INIT}/bin/busybox", "rmmod", module])
    try:
        error = plugin("ADD", config(**fields), netns=pods()).error(spec.KERNEL_REFUSED)
    finally:
        run([f"{_INIT}/bin/busybox", "insmod", f"{_INIT}/modules/{module}.ko"])
    assert f"modprobe {module}" in error["msg"]
    assert plugin.leftovers() == []
    pod = pods()
    plugin("ADD", config(**fields), netns=pod).ok()
    plugin("DEL", config(**fields), netns=pod).ok()


@pytest.mark.parametrize("where", ["node", "pod"])
def test_ipvlan_has_the_source(node: Root, plugin: Plugin, pods: Callable[[], Netns], where: str) -> None:
    """The kernel allows one receive handler for each device: the error names its link if it is on the node."""
    other = pods()
    node.ip("link add low0 up type dummy", "link add link low0 name ipv0 type ipvlan mode l2")
    if where == "pod":
        node.ip(f"link set ipv0 netns {other.path}")
    error = plugin("ADD", config(source="low0"), netns=pods()).error(spec.SOURCE_BUSY)
    assert ("'ipv0' (ipvlan)" if where == "node" else "ipvlan, MACsec or another driver") in error["msg"]
    assert plugin.leftovers() == []
    node.ip("link delete low0")


def test_a_bond_and_its_port(node: Root, plugin: Plugin, pods: Callable[[], Netns]) -> None:
    """A bond carries macvtaps, which outlive a port; its port carries none, and the error names the bond."""
    node.ip("link add bond7 type bond mode active-backup")
    for port in ("low1", "low2"):
        node.ip(f"link add {port} type dummy", f"link set {port} master bond7")
    node.ip("link set bond7 up")
    pod, conf = pods(), config(source="bond7")
    assert "'bond7'" in plugin("ADD", config(source="low1"), netns=pod).error(spec.SOURCE_BUSY)["msg"]
    result = plugin("ADD", conf, netns=pod).ok()
    node.ip("link delete low1")
    plugin("CHECK", conf | {"prevResult": result}, netns=pod).ok()
    plugin("DEL", conf, netns=pod).ok()
    assert plugin.leftovers() == []
    node.ip("link delete bond7", "link delete low2")
