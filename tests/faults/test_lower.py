"""Faults of the device below: an error of its own each, which names the culprit and leaves others alone."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cni import spec
from lab.wire import BRIDGE, BRIDGE_UPLINK, NIC
from tests.fakeipam import GATE, FakeIpam
from tests.faults.baseline import links
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab, Netns
    from tests.faults.baseline import Baseline
    from tests.runner import Answer, Plugin

IPAM = FakeIpam.config
MAC = "02:00:00:00:00:aa"


def refused(
    handle: Callable[..., Answer], pod: Netns, baseline: Baseline, code: int, *named: str, **fields: object
) -> None:
    """ADD is refused with that code, names the culprit, and leaves nothing."""
    msg = handle("ADD", config(ipam=IPAM, **fields), netns=pod).error(code)["msg"]
    for name in named:
        assert name in msg
    baseline.holds()


def test_missing(handle: Callable[..., Answer], pod: Netns, baseline: Baseline) -> None:
    refused(handle, pod, baseline, spec.SOURCE_MISSING, "nothing0", source="nothing0")
    handle("STATUS", config(source="nothing0")).error(spec.PLUGIN_NOT_AVAILABLE)


def test_renamed(lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline) -> None:
    """By udev, say, while an attachment was on it: the error says what it is called now."""
    other = lab.pod()
    result = handle("ADD", config(source=NIC), netns=other, container="c2").ok()
    lab.node.ip(f"link set {NIC} down", f"link set {NIC} name enp1s0", "link set enp1s0 up")
    said = f"source device {NIC!r} is called 'enp1s0' now"
    conf = config(source=NIC)
    assert said in handle("ADD", conf, netns=pod).error(spec.SOURCE_MISSING)["msg"]
    assert said in handle("STATUS", conf).error(spec.PLUGIN_NOT_AVAILABLE)["msg"]
    checked = handle("CHECK", conf | {"prevResult": result}, netns=other, container="c2")
    assert said in checked.error(spec.SOURCE_MISSING)["msg"]
    lab.node.ip(f"link property add dev enp1s0 altname {NIC}")
    handle("CHECK", conf | {"prevResult": result}, netns=other, container="c2").ok()
    handle("DEL", conf, netns=other, container="c2").ok()
    lab.node.ip(
        f"link property del dev enp1s0 altname {NIC}",
        "link set enp1s0 down",
        f"link set enp1s0 name {NIC}",
        f"link set {NIC} up",
    )
    baseline.holds()


def test_loopback(handle: Callable[..., Answer], pod: Netns, baseline: Baseline) -> None:
    refused(handle, pod, baseline, spec.INVALID_NETWORK_CONFIG, "lo", source="lo")


def test_a_port_of_a_bridge(handle: Callable[..., Answer], pod: Netns, baseline: Baseline) -> None:
    refused(handle, pod, baseline, spec.SOURCE_BUSY, BRIDGE_UPLINK, BRIDGE, source=BRIDGE_UPLINK)


def test_the_mac_is_taken(lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline) -> None:
    other = lab.pod()
    handle("ADD", config(source=NIC, mac=MAC), netns=other, container="holder").ok()
    before = links(other)
    answer = handle("ADD", config(source=NIC, mac=MAC, ipam=IPAM), netns=pod)
    msg = answer.error(spec.MAC_IN_USE)["msg"]
    assert MAC in msg
    assert "holder" in msg
    assert links(other) == before
    handle("DEL", config(source=NIC), netns=other, container="holder").ok()
    baseline.holds()
    handle(
        "ADD", config(source=NIC, mac=MAC), netns=pod
    ).ok()  # the retry: nothing of the failed one is in its way
    handle("DEL", config(source=NIC), netns=pod).ok()
    baseline.holds()


def test_the_mac_is_on_the_same_nic(
    lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline
) -> None:
    """The message names the VM on the NIC, by its pod: not the one on another NIC, nor does a rename matter."""
    others = {"near": (NIC, lab.pod()), "far": ("eth7", lab.pod())}
    lab.node.ip("link add eth7 up type veth peer name eth8")
    for name, (source, other) in others.items():
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME={name}"
        conf = config(source=source, mac=MAC)
        handle("ADD", conf, netns=other, container=name, args=args).ok()
    lab.node.ip(f"link set {NIC} down", f"link set {NIC} name nic", "link set nic up")
    lab.node.ip("link set eth7 down", f"link set eth7 name {NIC}", f"link set {NIC} up")
    for source, name in (("nic", "near"), (NIC, "far")):
        msg = handle("ADD", config(source=source, mac=MAC), netns=pod).error(spec.MAC_IN_USE)["msg"]
        assert f"MAC {MAC} is in use on {source!r} by net1 of pod prod/{name} " in msg
    for name, (_, other) in others.items():
        handle("DEL", config(source=NIC), netns=other, container=name).ok()
    lab.node.ip(f"link del {NIC}", "link set nic down", f"link set nic name {NIC}", f"link set {NIC} up")
    baseline.holds()


def test_the_mac_is_the_lowers(
    lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline
) -> None:
    mac = lab.node.links()[NIC]["address"]
    refused(handle, pod, baseline, spec.MAC_IN_USE, mac, NIC, source=NIC, mac=mac)


def test_the_mac_is_a_strangers(
    lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline
) -> None:
    lab.node.ip(f"link add link {NIC} name other address {MAC} type macvlan mode bridge", "link set other up")
    handle("ADD", config(source=NIC, mac=MAC, ipam=IPAM), netns=pod).error(spec.MAC_IN_USE)
    assert lab.node.links()["other"]["address"] == MAC
    lab.node.ip("link del other")
    baseline.holds()


@pytest.mark.parametrize("where", ["host", "pod"])
def test_passthru_is_taken(
    lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, where: str
) -> None:
    other = lab.pod()
    netns = f"netns {other.path}" if where == "pod" else ""
    lab.node.ip(f"link add link {NIC} name pt0 {netns} type macvtap mode passthru")
    answer = handle("ADD", config(source=NIC, ipam=IPAM), netns=pod)
    if where == "host":
        assert NIC in answer.error(spec.SOURCE_BUSY)["msg"]
    else:  # somebody else's, out of sight: all that is known is what the kernel says
        assert NIC in answer.error(spec.KERNEL_REFUSED)["msg"]
    owner = other if where == "pod" else lab.node
    assert "pt0" in owner.links()
    owner.ip("link del pt0")
    baseline.holds()


def test_the_mtu_is_too_large(handle: Callable[..., Answer], pod: Netns, baseline: Baseline) -> None:
    refused(handle, pod, baseline, spec.INVALID_NETWORK_CONFIG, "9000", NIC, source=NIC, mtu=9000)


def test_the_name_of_the_host_end_is_taken(
    lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline
) -> None:
    """By a link of somebody else's on the host: the pod's name is not blamed."""
    conf = config(source=BRIDGE, device="tap")
    port = handle("ADD", conf, netns=pod).ok()["interfaces"][1]["name"]
    handle("DEL", conf, netns=pod).ok()
    lab.node.ip(f"link add {port} type bridge")
    error = handle("ADD", conf, netns=pod).error(spec.KERNEL_REFUSED)
    assert f"a link that it needs exists: {port}" in error["msg"]
    lab.node.ip(f"link del {port}")
    baseline.holds()


def test_the_name_is_taken(handle: Callable[..., Answer], pod: Netns, baseline: Baseline) -> None:
    conf = config(source=NIC, ipam=IPAM)
    result = handle("ADD", conf, netns=pod).ok()
    before = links(pod)
    for container in ("c1", "c2"):
        msg = handle("ADD", conf, netns=pod, container=container).error(spec.NAME_IN_USE)["msg"]
        assert "net1" in msg
        assert links(pod) == before
    handle("DEL", conf, netns=pod, container="c2").ok()  # the runtime's, after the failure
    assert links(pod) == before
    handle("CHECK", conf | {"prevResult": result}, netns=pod).ok()
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()


def test_down(lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline) -> None:
    """A lower device without carrier: ADD succeeds, and the link comes to life with it."""
    lab.node.ip(f"link set {NIC} down")
    conf = config(source=NIC)
    handle("ADD", conf, netns=pod).ok()
    assert "LOWER_UP" not in pod.links()["net1"]["flags"]
    lab.node.ip(f"link set {NIC} up")
    assert "UP" in pod.links()["net1"]["flags"]
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize("source", ["lower0", "bridge0"])
def test_deleted_later(
    lab: Lab, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, source: str
) -> None:
    kind = "veth peer name lower1" if source == "lower0" else "bridge"
    lab.node.ip(f"link add {source} type {kind}")
    conf = config(source=source, device="macvtap" if source == "lower0" else "tap", ipam=IPAM)
    result = handle("ADD", conf, netns=pod).ok()
    lab.node.ip(f"link del {source}")
    handle("CHECK", conf | {"prevResult": result}, netns=pod).error(spec.SOURCE_MISSING)
    handle("STATUS", conf).error(spec.PLUGIN_NOT_AVAILABLE)
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize(("source", "device"), [("lower0", "macvtap"), ("bridge0", "tap")])
def test_vanishing_during_add(
    *,
    lab: Lab,
    plugin: Plugin,
    ipam: FakeIpam,
    pod: Netns,
    baseline: Baseline,
    source: str,
    device: str,
) -> None:
    """While the delegate runs, after everything was looked at: rolled back, lease and all."""
    kind = "veth peer name lower1" if device == "macvtap" else "bridge"
    lab.node.ip(f"link add {source} type {kind}")
    os.mkfifo(ipam.seen / "gate")
    ipam.write(ADD=GATE)
    answers: list[Answer] = []
    conf = config(source=source, device=device, ipam=IPAM)
    thread = threading.Thread(target=lambda: answers.append(plugin("ADD", conf, netns=pod)))
    thread.start()
    with (ipam.seen / "gate").open("w"):
        lab.node.ip(f"link del {source}")
    thread.join()
    assert source in answers[0].error(spec.SOURCE_MISSING)["msg"]
    assert ipam.commands() == ["ADD", "DEL"]
    baseline.holds()


def test_no_capability(plugin: Plugin, pod: Netns, baseline: Baseline) -> None:
    """What an unprivileged plugin is told, and that it breaks nothing."""
    *enter, executable = plugin.argv()
    argv = [*enter, "setpriv", "--bounding-set=-all", "--inh-caps=-all", executable]

    class Weak(type(plugin)):  # type: ignore[misc]
        def argv(self) -> list[str]:
            return argv

    weak = Weak(**vars(replace(plugin)))
    weak("ADD", config(source=NIC), netns=pod).error(spec.KERNEL_REFUSED)
    baseline.holds()
