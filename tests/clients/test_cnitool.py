"""Released software around the plugin: cnitool as its client, host-local under it, tuning and bandwidth after it.

What these do with a VM's interface was found out here; docs/chaining.md tells it to users.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni.kernel import netns, tapdev
from cni.state.store import in_netns
from lab.cnitool import Cnitool
from lab.process import run
from lab.wire import BRIDGE, NIC
from tests.runner import BIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab, Netns

DEVICES = {
    "macvtap": {"source": NIC},
    "tap-on-bridge": {"source": BRIDGE, "device": "tap"},
    "plain-tap": {"device": "tap"},
}
each_device = pytest.mark.parametrize("fields", [pytest.param(DEVICES[key], id=key) for key in DEVICES])

HOST_LOCAL = {
    "type": "host-local",
    "ranges": [[{"subnet": "10.9.0.0/24"}]],
}  # keeps its leases where it likes
NO_VETH = 'interface "net1" was not a veth interface'
MAC = "02:00:00:00:00:77"
OUR_MAC = "02:00:00:00:00:76"


@dataclass(frozen=True)
class Client:
    """cnitool, and the one network that it is told of."""

    cnitool: Cnitool
    lab: Lab
    folder: Path

    @property
    def tuning(self) -> dict[str, Any]:
        """The plugin tuning, with its notes in a folder of the test's."""
        return {"type": "tuning", "dataDir": str(self.folder / "tuning")}

    def network(self, *plugins: dict[str, Any], version: str = "1.1.0") -> None:
        """Write the list of plugins that the network "wire" is."""
        document = {"cniVersion": version, "name": "wire", "plugins": plugins}
        (self.folder / "wire.conflist").write_text(json.dumps(document))

    def __call__(self, command: str, pod: Netns) -> None:
        """A command that has to go well, without a word."""
        done = self.cnitool(command, "wire", pod.path)
        assert (done.stdout, done.stderr) == ("", "")

    def add(self, pod: Netns) -> dict[str, Any]:
        """The result of a chain that has to go well."""
        return self.cnitool.add("wire", pod.path)

    def refusal(self, command: str, pod: Netns) -> str:
        """What a command says that has to fail."""
        done = self.cnitool(command, "wire", pod.path, check=False)
        assert done.returncode == 1, done.stdout
        return done.stderr

    def left(self) -> list[str]:
        """Links, state, leases, cached results and notes of tuning that are still there: [] at the baseline."""
        links = [name for name in self.lab.node.links() if name not in ("lo", NIC, "eth2", BRIDGE)]
        return [*links, *self.cnitool.left(), *map(str, self.folder.glob("tuning/*"))]


@pytest.fixture
def client(lab: Lab, tmp_path: Path) -> Iterator[Client]:
    """A node with cnitool, which leaves nothing on the machine."""
    cache = Path("/var/lib/cni")
    before = cache.exists()
    with Cnitool(lab.node, netconf=tmp_path, policy=tmp_path / "interfaces.yaml") as cnitool:
        yield Client(cnitool, lab, tmp_path)
    assert cache.exists() is before


@pytest.fixture
def pod(lab: Lab) -> Netns:
    """A pod."""
    return lab.pod()


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0", "1.1.0"])
@each_device
def test_alone(client: Client, pod: Netns, version: str, fields: dict[str, Any]) -> None:
    """status, add, check, del and del again, in each version that has a check."""
    client.network({"type": "vmtap", **fields}, version=version)
    client("status", pod)
    result = client.add(pod)
    assert result["cniVersion"] == version
    assert result["interfaces"][0]["sandbox"] == str(pod.path)
    assert "net1" in pod.links()
    client("check", pod)
    client("del", pod)
    client("del", pod)
    assert (list(pod.links()), client.left()) == (["lo"], [])


def test_status_says_why(client: Client, pod: Netns) -> None:
    """status fails with our reason when the source is not there."""
    client.network({"type": "vmtap", "source": "eth99"})
    assert "eth99" in client.refusal("status", pod)


def test_capability_mac(client: Client, pod: Netns) -> None:
    """A MAC as the capability `mac`, by way of libcni's runtimeConfig."""
    client.network({"type": "vmtap", "source": NIC, "capabilities": {"mac": True}})
    client.cnitool.env["CAP_ARGS"] = json.dumps({"mac": MAC})
    assert client.add(pod)["interfaces"][0]["mac"] == MAC
    assert pod.links()["net1"]["address"] == MAC
    client("check", pod)
    client("del", pod)
    assert client.left() == []


@each_device
def test_host_local(client: Client, pod: Netns, fields: dict[str, Any]) -> None:
    """host-local leases an address, which is the guest's and not on the link; del frees it."""
    client.network({"type": "vmtap", "ipam": HOST_LOCAL, **fields})
    client("status", pod)
    result = client.add(pod)
    assert result["ips"] == [{"address": "10.9.0.2/24", "gateway": "10.9.0.1", "interface": 0}]
    assert "cni/networks/wire/10.9.0.2" in client.left()
    assert "10.9.0.2" not in pod.run(["ip", "address", "show"]).stdout
    client("check", pod)
    client("del", pod)
    assert (list(pod.links()), client.left()) == (["lo"], [])


def test_gc(client: Client, lab: Lab) -> None:
    """gc ends all that libcni's cache knows (it says del for each), and then asks plugin and delegate."""
    client.network({"type": "vmtap", "source": NIC, "ipam": HOST_LOCAL})
    pods = [lab.pod(), lab.pod()]
    for pod in pods:
        client.add(pod)
    client("gc", pods[0])
    assert [list(pod.links()) for pod in pods] == [["lo"], ["lo"]]
    assert client.left() == []


def test_gc_knows_no_list(client: Client, pod: Netns) -> None:
    """cnitool's gc has no list of valid attachments: what its cache has lost, as after a crash, is left alone."""
    client.network({"type": "vmtap", "source": NIC, "ipam": HOST_LOCAL})
    client.add(pod)
    (cached,) = [path for path in client.left() if "results" in path]
    os.unlink(client.cnitool.env["VMTAP_RUN"].removesuffix("state") + cached)
    client("gc", pod)
    assert "net1" in pod.links()
    client("del", pod)
    assert (list(pod.links()), client.left()) == (["lo"], [])


@each_device
def test_tuning(client: Client, pod: Netns, fields: dict[str, Any]) -> None:
    """tuning changes MAC, MTU, flags and sysctls of our link; check is true afterwards, del leaves nothing."""
    values = {"mac": MAC, "mtu": 1400, "promisc": True, "allmulti": False, "txQLen": 77}
    sysctl = {"net.ipv4.conf.IFNAME.log_martians": "1"}
    client.network(
        {"type": "vmtap", "ipam": HOST_LOCAL, **fields}, client.tuning | values | {"sysctl": sysctl}
    )
    client("status", pod)
    result = client.add(pod)
    assert result["interfaces"][0]["mac"] == MAC
    link = pod.links()["net1"]
    assert (link["address"], link["mtu"], link["txqlen"]) == (MAC, 1400, 77)
    assert "PROMISC" in link["flags"]
    assert "ALLMULTI" not in link["flags"]
    assert pod.run(["cat", "/proc/sys/net/ipv4/conf/net1/log_martians"]).stdout == "1\n"
    client("check", pod)
    client("del", pod)
    client("del", pod)
    assert (list(pod.links()), client.left()) == (["lo"], [])


@pytest.mark.parametrize("change", ["address 02:00:00:00:00:78", "mtu 1300", "promisc off"])
def test_tuning_check(client: Client, pod: Netns, change: str) -> None:
    """check fails when what tuning made is not so any more: one of the two says so."""
    client.network(
        {"type": "vmtap", "source": NIC}, client.tuning | {"mac": MAC, "mtu": 1400, "promisc": True}
    )
    client.add(pod)
    client("check", pod)
    pod.ip(f"link set net1 {change}")
    assert client.refusal("check", pod)
    client("del", pod)
    assert (list(pod.links()), client.left()) == (["lo"], [])


def test_tuning_and_our_promisc(client: Client, pod: Netns) -> None:
    """With our own "promisc": true, tuning's check fails unless it has it, too: it takes no word for off."""
    client.network({"type": "vmtap", "source": NIC, "promisc": True}, client.tuning)
    client.add(pod)
    assert "configured promisc is false" in client.refusal("check", pod)
    client("del", pod)
    client.network({"type": "vmtap", "source": NIC, "promisc": True}, client.tuning | {"promisc": True})
    client.add(pod)
    client("check", pod)
    client("del", pod)
    assert client.left() == []


def test_tuning_cannot_raise_the_mtu(client: Client, pod: Netns) -> None:
    """An MTU that tuning puts above ours fails our check: say it in ours instead."""
    client.network({"type": "vmtap", "source": NIC, "mtu": 1400}, client.tuning | {"mtu": 1500})
    client.add(pod)
    assert "MTU is 1500" in client.refusal("check", pod)
    client("del", pod)
    assert client.left() == []


@each_device
def test_tuning_and_the_launcher(client: Client, pod: Netns, fields: dict[str, Any]) -> None:
    """The launcher opens a tuned link, and gives the guest the MTU, and on a macvtap the MAC, that it has now."""
    client.network({"type": "vmtap", "mac": OUR_MAC, **fields}, client.tuning | {"mac": MAC, "mtu": 1400})
    client.add(pod)
    shown = run([BIN / "vmtap-launch", "--netns", pod.path, "--print", "--", "true"], env=client.cnitool.env)
    macvtap = fields == DEVICES["macvtap"]
    assert f"mac={MAC if macvtap else OUR_MAC},host_mtu=1400" in shown.stdout
    namespace = netns.open_path(str(pod.path))
    try:
        (record,) = in_netns(client.cnitool.env["VMTAP_RUN"], netns.identity(namespace))
        tuned = tapdev.tuned(namespace, record)
        assert tuned
        for fd in tapdev.open_queues(namespace, tuned, 1):
            os.close(fd)
    finally:
        os.close(namespace)
    client("del", pod)
    assert client.left() == []


RATE = {
    "type": "bandwidth",
    "ingressRate": 10**6,
    "ingressBurst": 10**6,
    "egressRate": 10**6,
    "egressBurst": 10**6,
}


@each_device
def test_bandwidth_refuses(client: Client, pod: Netns, fields: dict[str, Any]) -> None:
    """bandwidth with a rate refuses our link, as it is not a veth's end; del after that leaves nothing."""
    client.network({"type": "vmtap", "ipam": HOST_LOCAL, **fields}, client.tuning | {"mtu": 1400}, RATE)
    client("status", pod)
    assert NO_VETH in client.refusal("add", pod)
    assert "net1" in pod.links()  # libcni undoes nothing: a runtime does, by DEL
    client("del", pod)
    assert (list(pod.links()), client.left()) == (["lo"], [])


def test_bandwidth_without_a_rate(client: Client, pod: Netns) -> None:
    """bandwidth with no rate, as with a capability that nobody used, lets ADD pass; its check fails all the same."""
    client.network(
        {"type": "vmtap", "source": NIC}, {"type": "bandwidth", "capabilities": {"bandwidth": True}}
    )
    client.add(pod)
    assert NO_VETH in client.refusal("check", pod)
    client("del", pod)
    assert (list(pod.links()), client.left()) == (["lo"], [])


def test_gc_of_the_chain(client: Client, pod: Netns) -> None:
    """gc and status pass through the whole chain: tuning, bandwidth and host-local have nothing against them."""
    plain = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
    client.network({"type": "vmtap", "source": NIC, "ipam": HOST_LOCAL}, client.tuning | {"mtu": 1400}, plain)
    client("status", pod)
    client.add(pod)
    client("gc", pod)
    assert (list(pod.links()), client.left()) == (["lo"], [])
