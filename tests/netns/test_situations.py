"""Situations that users of other plugins have reported; docs/situations.md lists them all."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from cni import spec
from lab.process import LabError
from lab.wire import BRIDGE, NIC
from tests.fakeipam import FakeIpam
from tests.runner import Plugin, config, pod_args
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from lab.wire import Lab, Netns

LOWER = "low0"


@pytest.fixture
def lower(lab: Lab) -> str:
    """A NIC of the node that a test may change."""
    lab.node.ip(f"link add {LOWER} mtu 9000 up type veth peer name low1 mtu 9000", "link set low1 up")
    return LOWER


def _whole_life(plugin: Plugin, pod: Netns | str, **fields: Any) -> dict[str, Any]:
    """ADD, CHECK and DEL succeed and leave nothing; ADD's result."""
    conf = config(**fields)
    result = plugin("ADD", conf, netns=pod).ok()
    plugin("CHECK", conf | {"prevResult": result}, netns=pod).ok()
    plugin("DEL", conf, netns=pod).ok()
    assert plugin.leftovers() == []
    return result


# The lower device


@pytest.mark.parametrize("kind", ["macvlan", "macvtap"])
def test_the_source_is_a_macvlan_itself(lab: Lab, plugin: Plugin, kind: str) -> None:
    """The kernel takes its lower device, and CHECK knows that."""
    lab.node.ip(f"link add link {NIC} name mv0 up type {kind} mode bridge")
    _whole_life(plugin, lab.pod(), source="mv0")


def test_the_node_is_a_container_with_a_macvlan(lab: Lab, tmp_path: Path) -> None:
    """The lower device is in a network namespace that the node has no name for."""
    inner = lab.pod("inner")
    lab.node.ip(f"link add link {NIC} name eth9 netns {inner.path} type macvlan mode bridge")
    inner.ip("link set eth9 up")
    plugin = Plugin(node=inner, state=tmp_path / "state", policy=tmp_path / "interfaces.yaml")
    _whole_life(plugin, lab.pod(), source="eth9")


def test_check_names_the_mode(lab: Lab, plugin: Plugin) -> None:
    """The policy's first mode is another one now; the attachment keeps its own."""
    policy = "interfaces: [{{name: dataplane, source: {{dev: {0}}}, modes: [{1}]}}]"
    plugin.policy.write_text(policy.format(NIC, "bridge"))
    pod = lab.pod()
    conf = config(interface="dataplane")
    result = plugin("ADD", conf, netns=pod).ok()
    plugin.policy.write_text(policy.format(NIC, "vepa"))
    error = plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(spec.CHECK_FAILED)
    assert error["msg"] == 'net1: mode is "bridge", and should be "vepa"'
    plugin("DEL", conf, netns=pod).ok()


def test_the_lower_device_is_made_again(lab: Lab, plugin: Plugin, lower: str) -> None:
    """As when its driver is loaded again: the link is gone, CHECK says so, and another pod is not affected."""
    pod, other = lab.pod(), lab.pod()
    conf = config(source=lower)
    result = plugin("ADD", conf, netns=pod).ok()
    lab.node.ip(f"link delete {lower}", f"link add {lower} up type veth peer name low1")
    assert "gone" in plugin("CHECK", conf | {"prevResult": result}, netns=pod).error(spec.CHECK_FAILED)["msg"]
    plugin("ADD", conf, netns=other, container="c2").ok()
    plugin("DEL", conf, netns=pod).ok()
    assert "net1" in other.links()
    plugin("DEL", conf, netns=other, container="c2").ok()
    assert plugin.leftovers() == []


def test_the_lower_device_goes_to_another_namespace(lab: Lab, plugin: Plugin, lower: str) -> None:
    """The link stays, as the kernel keeps it; new ADDs are refused, and DEL leaves nothing."""
    pod, conf = lab.pod(), config(source=lower)
    plugin("ADD", conf, netns=pod).ok()
    lab.node.ip(f"link set {lower} netns {lab.pod().path}")
    assert "net1" in pod.links()
    plugin("ADD", conf, netns=lab.pod(), container="c2").error(spec.SOURCE_MISSING)
    plugin("DEL", conf, netns=pod).ok()
    assert "net1" not in pod.links()
    assert plugin.leftovers() == []


def test_the_mtu_of_the_lower_device_changes(lab: Lab, plugin: Plugin, lower: str) -> None:
    """The link follows it down, and does not come up again with it; CHECK tolerates both."""
    pod, conf = lab.pod(), config(source=lower)
    result = plugin("ADD", conf, netns=pod).ok()
    for mtu in (1500, 9000):
        lab.node.ip(f"link set {lower} mtu {mtu}")
        assert pod.links()["net1"]["mtu"] == 1500
        plugin("CHECK", conf | {"prevResult": result}, netns=pod).ok()


def test_the_node_wants_the_nic_for_a_bridge(lab: Lab, plugin: Plugin, lower: str) -> None:
    """The kernel refuses it while there are attachments, and not after the last one."""
    pod, conf = lab.pod(), config(source=lower)
    plugin("ADD", conf, netns=pod).ok()
    with pytest.raises(LabError, match="busy"):
        lab.node.ip(f"link set {lower} master {BRIDGE}")
    plugin("DEL", conf, netns=pod).ok()
    lab.node.ip(f"link set {lower} master {BRIDGE}")


@pytest.mark.parametrize("fields", [{"promisc": True}, {"allmulti": True}, {"allmulti": False}])
def test_the_flags_of_the_nic_come_back(lab: Lab, plugin: Plugin, fields: dict[str, Any]) -> None:
    def flags() -> tuple[int, int]:
        link = lab.node.links()[NIC]
        return link["promiscuity"], link["allmulti"]

    before = flags()
    _whole_life(plugin, lab.pod(), source=NIC, **fields)
    assert flags() == before


# The pod


def test_ipv6_is_off_in_the_pod(lab: Lab, plugin: Plugin, tmp_path: Path) -> None:
    """As a runtime may have it: an address that is to be on the link switches it on there, and only there."""
    ipam = FakeIpam(tmp_path / "ipam")
    ipam.write(
        answer={"cniVersion": "1.1.0", "ips": [{"address": "fd00:9::5/64"}, {"address": "10.9.0.5/24"}]}
    )
    plugin = Plugin(lab.node, plugin.state, plugin.policy, cni_path=str(ipam.folder))
    pod = lab.pod()
    for scope in ("all", "default"):
        pod.run(["sysctl", "-qw", f"net.ipv6.conf.{scope}.disable_ipv6=1"])
    _whole_life(plugin, pod, source=NIC, ipam=ipam.config, addressing="link")
    _whole_life(plugin, pod, source=NIC, ipam=ipam.config)
    conf = config(source=NIC, ipam=ipam.config, addressing="link", mtu=1000)
    error = plugin("ADD", conf, netns=pod).error(spec.INVALID_NETWORK_CONFIG)
    assert "1000 is less than 1280, which address fd00:9::5/64 needs" in error["msg"]
    assert ipam.leases() == set()
    assert plugin.leftovers() == []


def test_a_pod_with_a_user_namespace(plugin: Plugin) -> None:
    """hostUsers: false. The network namespace is that user namespace's, and its path is a process's."""
    process = subprocess.Popen(["unshare", "--user", "--map-root-user", "--net", "sleep", "3600"])
    try:
        host = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{process.pid}/ns/net"), "no namespace", lambda link: link != host)
        for fields in ({"source": NIC}, {"source": NIC, "owner": 107}, {"device": "tap"}, {"source": BRIDGE}):
            _whole_life(plugin, f"/proc/{process.pid}/ns/net", **fields)
    finally:
        process.kill()
        process.wait()


def test_one_pod_and_many_networks_at_once(lab: Lab, plugin: Plugin) -> None:
    pod, names = lab.pod(), [f"net{number}" for number in range(1, 7)]

    def run(command: str, name: str) -> dict[str, Any]:
        return plugin(command, config(name=name, source=NIC), netns=pod, ifname=name, args=pod_args()).ok()

    with ThreadPoolExecutor(len(names)) as pool:
        results = list(pool.map(lambda name: run("ADD", name), names))
        assert len({result["interfaces"][0]["mac"] for result in results}) == len(names)
        list(pool.map(lambda name: run("DEL", name), names))
    assert set(pod.links()) == {"lo"}
    assert plugin.leftovers() == []


def test_the_path_of_a_sandbox_is_used_again(lab: Lab, plugin: Plugin, tmp_path: Path) -> None:
    """DEL of the old sandbox comes after ADD of the new one, with the same path: each ends its own link."""
    old, new, conf = lab.pod(), lab.pod(), config(source=NIC)
    path = tmp_path / "sandbox"
    path.symlink_to(old.path)
    plugin("ADD", conf, netns=path, container="old").ok()
    path.unlink()
    path.symlink_to(new.path)
    plugin("ADD", conf, netns=path, container="new").ok()
    plugin("DEL", conf, netns=path, container="old").ok()
    assert ("net1" in old.links(), "net1" in new.links()) == (False, True)
    plugin("DEL", conf, netns=path, container="new").ok()
    assert plugin.leftovers() == []


# The process


@pytest.mark.parametrize(
    "before",
    [
        "cd $(mktemp -d); rmdir $PWD",
        "umask 0777",
        "ulimit -n 16",
        "unset PATH HOME LANG",
        "mount -t tmpfs none /dev",
        "mount --bind /proc/sys /proc/sys; mount -o remount,ro,bind /proc/sys",
    ],
)
@pytest.mark.parametrize("fields", [{"source": NIC}, {"device": "tap"}])
def test_how_the_runtime_starts_it(lab: Lab, plugin: Plugin, before: str, fields: dict[str, Any]) -> None:
    """Its working folder is gone, its limits are low, its /dev is empty, its /proc/sys is read-only."""
    pod = lab.pod()
    shell = ["unshare", "--mount", "/bin/sh", "-c", f'{before}; exec "$0"', plugin.argv()[-1]]
    for command in ("ADD", "DEL"):
        done = subprocess.run(
            [str(word) for word in lab.node.argv(shell)],
            input=json.dumps(config(**fields)).encode(),
            env=plugin.environment(command, pod),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done
        assert ("net1" in pod.links()) == (command == "ADD")
    assert plugin.leftovers() == []


@pytest.mark.parametrize("inodes", range(2, 9))
def test_the_file_system_of_the_state_is_full(lab: Lab, plugin: Plugin, tmp_path: Path, inodes: int) -> None:
    """Whatever cannot be made first: one error that says so. What was attached before is ended by DEL."""
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_inodes={inodes},size=64k", "none", folder], check=True)
    try:
        plugin = Plugin(lab.node, folder / "state", plugin.policy)
        pods, conf = [lab.pod(), lab.pod()], config(source=NIC)
        for pod, container in zip(pods, ("c1", "c2"), strict=True):
            answer = plugin("ADD", conf, netns=pod, container=container)
            if answer.status:
                assert "file system full" in answer.error(spec.IO_FAILURE)["msg"]
                assert "net1" not in pod.links()
        for pod, container in zip(pods, ("c1", "c2"), strict=True):
            plugin("DEL", conf, netns=pod, container=container).ok()
            assert "net1" not in pod.links()
        assert plugin.leftovers() == []
    finally:
        subprocess.run(["umount", folder], check=True)
