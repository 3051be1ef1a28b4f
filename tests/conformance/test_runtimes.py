"""What runtimes really send, as opposed to what the spec lets them send."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import NIC, Netns
from tests.conformance.test_invocation import VERSIONS, each_device
from tests.runner import config

if TYPE_CHECKING:
    from tests.conformance.conftest import HostLocal
    from tests.runner import Plugin


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0", "1.1.0"])
@each_device
def test_runtime_containerd(
    plugin: Plugin, host_local: HostLocal, version: str, fields: dict[str, Any]
) -> None:
    """containerd: ADD, DEL with netns and prevResult, then DEL again with an empty netns and no prevResult."""
    before = set(plugin.node.links())
    args = (
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;"
        "K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=8f1b4c0e"
    )
    conf = config(cniVersion=version, cniVersions=["0.4.0", "1.0.0", "1.1.0"], ipam=host_local.ipam, **fields)
    with Netns("pod") as pod:
        result = plugin("ADD", conf, netns=pod, args=args).ok()
        first = plugin("DEL", conf | {"prevResult": result}, netns=pod, args=args)
        assert list(pod.links()) == ["lo"]
    second = plugin("DEL", conf, netns="", args=args)
    for answer in (first, second):
        assert (answer.status, answer.stdout) == (0, b"")
    assert (set(plugin.node.links()), host_local.leases(), plugin.leftovers()) == (before, [], [])


def test_runtime_containerd_status(plugin: Plugin) -> None:
    """containerd 2: STATUS at every CRI Status, with nothing of an attachment."""
    environment = {"CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": "", "CNI_ARGS": ""}
    answer = plugin("STATUS", config(source=NIC), env=environment)
    assert (answer.status, answer.stdout) == (0, b"")


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0", "1.1.0"])
def test_runtime_podman_probe(plugin: Plugin, version: str) -> None:
    """podman, and libcni: VERSION with "dummy" for everything, stdin with the version alone."""
    environment = {"CNI_CONTAINERID": "", "CNI_NETNS": "dummy", "CNI_IFNAME": "dummy", "CNI_PATH": "dummy"}
    answer = plugin("VERSION", json.dumps({"cniVersion": version}).encode(), env=environment)
    assert answer.ok() == {"cniVersion": version, "supportedVersions": list(VERSIONS)}
    assert answer.stderr == ""


@pytest.mark.parametrize("command", ["GC", "STATUS"])
def test_runtime_libcni_empty(plugin: Plugin, command: str) -> None:
    """libcni: GC and STATUS with every variable of an attachment there and empty."""
    environment = {"CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": "", "CNI_ARGS": ""}
    conf = config(source=NIC, **({"cni.dev/valid-attachments": None} if command == "GC" else {}))
    answer = plugin(command, conf, env=environment)
    assert (answer.status, answer.stdout) == (0, b"")


def test_runtime_libcni_gc(plugin: Plugin, pod: Netns, host_local: HostLocal) -> None:
    """libcni's GC: first DEL for each stale attachment of its cache, then GC under both of the list's names."""
    conf = config(source=NIC, ipam=host_local.ipam)
    result = plugin("ADD", conf, netns=pod).ok()
    plugin("DEL", conf | {"prevResult": result}, netns=pod).ok()
    plugin(
        "GC", conf | {"cni.dev/valid-attachments": [], "cni.dev/attachments": []}, container="", ifname=""
    ).ok()
    assert (list(pod.links()), host_local.leases(), plugin.leftovers()) == (["lo"], [], [])


def test_runtime_multus_delegate(plugin: Plugin, pod: Netns) -> None:
    """Multus: a delegate's config by name of the device that the kubelet allocated, its id at two places."""
    plugin.policy.write_text(f"interfaces:\n- {{name: dataplane, source: {{dev: {NIC}}}, type: ethernet}}\n")
    conf = config(
        cniVersion="0.3.1",
        capabilities={"deviceID": True},
        runtimeConfig={"deviceID": "dataplaneMvp0"},
        deviceID="dataplaneMvp0",
        pciBusID="dataplaneMvp0",
    )
    result = plugin("ADD", conf, netns=pod).ok()
    assert result["interfaces"][0]["sandbox"] == str(pod.path)
    plugin("DEL", conf | {"prevResult": result}, netns=pod).ok()
    assert (list(pod.links()), plugin.leftovers()) == (["lo"], [])
