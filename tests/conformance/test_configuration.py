"""Checklist items 12 and 13: what is accepted as a network config, and which of several values counts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lab.wire import NIC
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Netns
    from tests.runner import Plugin

DOCUMENT = json.dumps(config(source=NIC))


@pytest.mark.parametrize(
    "stdin",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{} {}",
        b'{"name": "\xff"}',
        b"\xef\xbb\xbf" + DOCUMENT.encode(),
        DOCUMENT.encode("utf-16"),
    ],
)
def test_item_12_no_json(plugin: Plugin, stdin: bytes) -> None:
    """What is no JSON object in UTF-8 is error 6."""
    plugin("ADD", stdin, netns="/nowhere").error(6)


@pytest.mark.parametrize("name", [{}, {"name": ""}, {"name": None}], ids=["absent", "empty", "null"])
@pytest.mark.parametrize("command", ["ADD", "GC"])
def test_item_12_no_name(plugin: Plugin, command: str, name: dict[str, Any]) -> None:
    """A missing network name is error 7."""
    conf = {"cniVersion": "1.1.0", "type": "vmtap", "source": NIC} | name
    assert plugin(command, conf, netns="/nowhere").error(7)["msg"].startswith("name: ")


def test_item_12_well_known(plugin: Plugin, pod: Netns) -> None:
    """The spec's keys, and what runtimes add, are always accepted."""
    conf = config(
        source=NIC,
        cniVersions=["0.4.0", "1.1.0"],
        ipMasq=True,
        ipam={},
        dns={"nameservers": ["10.9.0.1"], "search": None},
        capabilities={"mac": True, "portMappings": True, "io.kubernetes.cri.pod-annotations": True},
        runtimeConfig={"portMappings": [{"hostPort": 80}], "io.kubernetes.cri.pod-annotations": {"a": "b"}},
        args={"cni": {"labels": []}},
        disableCheck=False,
        disableGC=False,
        loadOnlyInlinedPlugins=True,
        prevResult=None,
        **{"cni.dev/anything": {"at": "all"}},
    )
    result = plugin("ADD", conf, netns=pod).ok()
    assert result["dns"] == {"nameservers": ["10.9.0.1"]}
    assert list(pod.links()) == ["lo", "net1"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("sorce", "source"), ("MTU", "mtu"), ("allmutli", "allmulti"), ("cniVersion ", "cniVersion")],
)
def test_item_12_unknown_key(plugin: Plugin, key: str, nearest: str) -> None:
    """An unknown key is error 2 with key and value, and names the nearest key that there is."""
    error = plugin("ADD", config(source=NIC, **{key: "eth7"}), netns="/nowhere").error(2)
    assert f'{key}: unknown key, its value is "eth7"; did you mean "{nearest}"?' == error["msg"]


ARGS, CONFIG, RUNTIME = "02:00:00:00:0c:01", "02:00:00:00:0c:02", "02:00:00:00:0c:03"


@pytest.mark.parametrize(
    ("fields", "args", "used"),
    [
        ({"capabilities": {"mac": True}, "runtimeConfig": {"mac": RUNTIME}}, f"MAC={ARGS}", RUNTIME),
        ({"capabilities": {"mac": False}, "runtimeConfig": {"mac": RUNTIME}}, f"MAC={ARGS}", ARGS),
        ({"capabilities": {"mac": True}, "runtimeConfig": {}}, f"MAC={ARGS}", ARGS),
        ({"capabilities": {"mac": True}}, "", CONFIG),
        ({"capabilities": {}, "runtimeConfig": {"mac": RUNTIME}}, "", CONFIG),
        ({"runtimeConfig": {"mac": RUNTIME}}, "", RUNTIME),
    ],
)
def test_item_13_mac(plugin: Plugin, pod: Netns, fields: dict[str, Any], args: str, used: str) -> None:
    """The MAC: runtimeConfig if declared, then CNI_ARGS, then the config. No capabilities at all: all is declared."""
    result = plugin("ADD", config(source=NIC, mac=CONFIG, **fields), netns=pod, args=args).ok()
    assert result["interfaces"][0]["mac"] == used
    assert pod.links()["net1"]["address"] == used


def test_item_13_multus(plugin: Plugin, pod: Netns) -> None:
    """Multus: keys of CNI_ARGS twice, deviceID and pciBusID at the top level."""
    plugin.policy.write_text(f"interfaces:\n- {{name: dataplane, source: {{dev: {NIC}}}, type: ethernet}}\n")
    args = (
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u;"
        "IgnoreUnknown=true;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;MAC=02:00:00:00:0c:09;SOMETHING=else"
    )
    conf = config(deviceID="dataplaneMvp3", pciBusID="")
    result = plugin("ADD", conf, netns=pod, args=args).ok()
    assert result["interfaces"][0]["mac"] == "02:00:00:00:0c:09"
    assert pod.links()["net1"]["linkinfo"]["info_kind"] == "macvtap"


@pytest.mark.parametrize(
    ("args", "named"),
    [("FOO=1", "FOO"), ("MAc=1;IgnoreUnknown=0", '"MAC"'), ("MAC", '"MAC"'), ("IgnoreUnknown=x", '"x"')],
)
def test_item_13_unknown_args(plugin: Plugin, args: str, named: str) -> None:
    """What we do not know in CNI_ARGS is error 4 and named, unless IgnoreUnknown."""
    error = plugin("ADD", config(source=NIC), netns="/nowhere", args=args).error(4)
    assert "CNI_ARGS" in error["msg"]
    assert named in error["msg"]


def test_item_13_mac_survives(plugin: Plugin, pods: Callable[[], Netns]) -> None:
    """With no MAC given, a VM whose pod is made again has the one it had."""
    macs = []
    for name in ("virt-launcher-web-abcde", "virt-launcher-web-fghij"):
        pod = pods()
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME={name}"
        plugin("ADD", config(source=NIC), netns=pod, container=name, args=args).ok()
        macs.append(pod.links()["net1"]["address"])
        plugin("DEL", config(source=NIC), netns=pod, container=name, args=args).ok()
    assert macs[0] == macs[1]
