"""libvirt's contract, with a real libvirt: what virt-launcher defines boots on our devices, and reaches the wire.

libvirt takes the target of an <interface type='ethernet'> for a macvtap if its mount namespace has
/dev/tap<ifindex>, opened once a queue; else it attaches to a tap of that name by /dev/net/tun.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from lab.libvirt import QEMU_USER, Daemon, Domain, Nic, ifname
from lab.process import LabError
from lab.wire import PEER_ADDRESS
from tests.kubevirt.conftest import LauncherPod, Nodes, open_devices, status_of

if TYPE_CHECKING:
    from lab.guest import Image
    from lab.wire import Lab
    from tests.runner import Plugin

pytestmark = pytest.mark.vm

ADDRESS, PEER = "10.77.0.5/24", PEER_ADDRESS.partition("/")[0]
SECOND_ADDRESS, SECOND_PEER = "10.77.1.5/24", "10.77.1.254"
THIRD_ADDRESS, THIRD_PEER = "10.77.2.5/24", "10.77.2.254"
MAC = "02:00:00:00:00:07"
NET_BIND_SERVICE = "0000000000000400"
TUN = "/dev/net/tun"
MACVTAP: dict[str, Any] = {"deviceID": "dataplaneMvp3"}
TAP: dict[str, Any] = {"interface": "lan", "device": "tap", "owner": QEMU_USER, "group": QEMU_USER}
PLAIN_TAP: dict[str, Any] = {"device": "tap", "owner": QEMU_USER, "group": QEMU_USER}


def test_names_are_kubevirts() -> None:
    """One that was seen on a real KubeVirt."""
    assert ifname("sec") == "podadd93534eeb"


def test_each_kind_of_link(lab: Lab, plugin: Plugin, image: Image) -> None:
    """A macvtap, a tap on a bridge, and a plain tap, whose other end is the pod's kernel.

    The first two have no MAC in the VM's spec, so KubeVirt takes the links'; the last one's end in the pod has an
    address of its own. It always takes the links' MTU.
    """
    pod = LauncherPod(plugin, lab.pod())
    pod.add("red", **MACVTAP, mtu=1400)
    pod.add("blue", **TAP)
    pod.add("green", **PLAIN_TAP, mac=MAC)
    node = pod.node("red")
    made = node.stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (QEMU_USER, QEMU_USER, 0o660)
    assert not pod.node("blue").exists()  # nothing for a device plugin to announce
    assert pod.link("green")["address"] != MAC
    lab.peer.ip(f"address add {SECOND_PEER}/24 dev eth0")
    pod.netns.ip(f"address add {THIRD_PEER}/24 dev {ifname('green')}")
    nics = [Nic("red", ADDRESS), Nic("blue", SECOND_ADDRESS), Nic("green", THIRD_ADDRESS, mac=MAC)]
    with Daemon(pod.netns, [node]) as daemon, Domain(daemon, image, nics) as guest:
        guest.ready()
        _is_confined(daemon, guest)
        assert _devices(guest) == [TUN, TUN, f"/dev/{node.name}"]
        links = [pod.link("red"), pod.link("blue")]
        assert _nics(guest) == {links[0]["address"]: "1400", links[1]["address"]: "1500", MAC: "1500"}
        for peer in (PEER, SECOND_PEER, THIRD_PEER):
            assert guest.ping(peer)
    # The domain's end leaves the links: the next domain of this pod finds them.
    assert pod.link("red")["operstate"] == "UP"
    assert {ifname("blue"), ifname("green")} < set(pod.netns.links())


def test_two_queues(lab: Lab, plugin: Plugin, image: Image) -> None:
    """networkInterfaceMultiqueue is the VM's: each of its NICs has the queues. Only a tap must know them before."""
    pod = LauncherPod(plugin, lab.pod())
    pod.add("red", **MACVTAP)
    pod.add("green", deviceID="dataplaneMvp4")
    pod.add("blue", **TAP, queues=2)
    nodes = [pod.node("red"), pod.node("green")]
    lab.peer.ip(f"address add {SECOND_PEER}/24 dev eth0", f"address add {THIRD_PEER}/24 dev eth0")
    nics = [Nic("red", ADDRESS), Nic("green", SECOND_ADDRESS), Nic("blue", THIRD_ADDRESS)]
    with Daemon(pod.netns, nodes) as daemon, Domain(daemon, image, nics, queues=2) as guest:
        guest.ready()
        assert _devices(guest) == sorted([*(f"/dev/{node.name}" for node in nodes), TUN] * 2)
        for card in range(3):
            assert len(guest.must(f"ls -d /sys/class/net/eth{card}/queues/rx-*").split()) == 2
        for peer in (PEER, SECOND_PEER, THIRD_PEER):
            # Longer than a frame: by the offloads that the vnet header speaks of.
            assert guest.run(f"ping -c 1 -W 10 -s 8000 {peer}").status == 0


def test_what_libvirt_says_of_a_misfit(lab: Lab, plugin: Plugin, image: Image) -> None:
    """The table of symptoms in docs/kubevirt.md."""
    invalid = "Unable to create tap device pod.*: Invalid argument"
    denied = "cannot open macvtap tap device /dev/tap.*: Permission denied"
    # By network: the config, the VM's queues, what libvirt says.
    misfits: dict[str, tuple[dict[str, Any], int, str]] = {
        "no-device": (MACVTAP, 1, invalid),
        "device-of-root": ({"deviceID": "dataplaneMvp4"}, 1, denied),
        "queue-too-few": (TAP, 2, invalid),
        "queue-too-many": (TAP | {"queues": 2}, 1, invalid),
        "tap-of-root": (TAP | {"owner": 0, "group": 0}, 1, "tap device pod.*: Operation not permitted"),
    }
    pod = LauncherPod(plugin, lab.pod())
    for network, (fields, _, _) in misfits.items():
        pod.add(network, **fields)
    node = pod.node("device-of-root")
    os.chown(node, 0, 0)
    with Daemon(pod.netns, [node]) as daemon:
        for network, (_, queues, said) in misfits.items():
            with pytest.raises(LabError, match=said):
                Domain(daemon, image, [Nic(network)], queues=queues)


def test_a_live_migration(nodes: Nodes, image: Image) -> None:
    """Nobody gave a MAC, and the devices differ: the guest goes on as if nothing had been, its switch follows it."""
    source = LauncherPod(nodes.first, nodes.lab.pod("source"), suffix="x7k2p")
    target = LauncherPod(nodes.second, nodes.lab.pod("target"), suffix="9qwz4")
    mac = source.add("red", **MACVTAP)["interfaces"][0]["mac"]
    target.add("red", deviceID="dataplaneMvp41")
    with (
        Daemon(source.netns, [source.node("red")]) as here,
        Daemon(target.netns, [target.node("red")]) as there,
        Domain(here, image, [Nic("red", ADDRESS)]) as guest,
    ):
        guest.ready()
        assert guest.ping(PEER)
        assert nodes.port_of(mac) == "node"
        guest.migrate(there)
        assert _devices(guest) == [f"/dev/{target.node('red').name}"]
        assert guest.ping(PEER)
        assert nodes.port_of(mac) == "node2"
        assert _nics(guest) == {mac: "1500"}


def _nics(guest: Domain) -> dict[str, str]:
    """The MTU of each of the guest's NICs, by MAC."""
    words = guest.must("cd /sys/class/net; for each in eth*; do cat $each/address $each/mtu; done").split()
    return dict(zip(words[::2], words[1::2], strict=True))


def _devices(guest: Domain) -> list[str]:
    """The network devices that QEMU has open, an entry a queue."""
    return [device for device in open_devices(guest.pid) if device == TUN or device.startswith("/dev/tap")]


def _is_confined(daemon: Daemon, guest: Domain) -> None:
    """As KubeVirt's containers are: what QEMU could do here beyond that would prove nothing."""
    for pid in (*daemon.processes("libvirtd"), guest.pid):
        status = status_of(pid)
        assert status["Uid"].split() == [str(QEMU_USER)] * 4
        assert status["Gid"].split() == [str(QEMU_USER)] * 4
        assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == (
            NET_BIND_SERVICE,
            NET_BIND_SERVICE,
            "1",
        )
