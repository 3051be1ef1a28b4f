"""A real QEMU on what the real executable made, started by the real launcher: does the guest reach the peer?"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab.guest import Guest, Image, Nic
from tests.runner import config
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab, Netns
    from tests.runner import Plugin

pytestmark = pytest.mark.vm

ADDRESS = "10.77.0.5/24"
PEER = "10.77.0.254"


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The guest's kernel and initramfs."""
    with Image() as made:
        yield made


def _attach(plugin: Plugin, pod: Netns, ifname: str = "net1", **fields: Any) -> str:
    """ADD, and the guest's MAC."""
    answer = plugin("ADD", config(**fields), netns=pod, ifname=ifname).ok()
    return next(str(each["mac"]) for each in answer["interfaces"] if each["name"] == ifname)


def _guest(plugin: Plugin, image: Image, pod: Netns, nics: list[Nic], *options: str, **more: Any) -> Guest:
    env = {**os.environ, "VMTAP_RUN": str(plugin.state)}
    return Guest(image, pod.path, nics, env=env, launch_options=options, **more)


@pytest.mark.parametrize(
    "fields",
    [
        {"source": "eth1", "mode": "vepa"},
        {"source": "eth1", "mode": "bridge", "queues": 2},
        {"source": "br0"},
        {"source": "br0", "queues": 2},
    ],
    ids=["macvtap", "macvtap of two queues", "tap on a bridge", "tap of two queues"],
)
def test_a_guest_reaches_the_peer(lab: Lab, plugin: Plugin, image: Image, fields: dict[str, Any]) -> None:
    pod = lab.pod()
    mac = _attach(plugin, pod, **fields)
    queues = fields.get("queues", 1)
    with _guest(plugin, image, pod, [Nic(mac, ADDRESS)], processors=queues) as guest:
        guest.ready()
        assert guest.ping(PEER)
        receiving = guest.must("ls -d /sys/class/net/eth0/queues/rx-*").split()
        assert len(receiving) == queues
        # Long frames use the offloads that the vnet header speaks of.
        assert guest.run(f"ping -c 1 -W 10 -s 8000 {PEER}").status == 0
        status = Path(f"/proc/{guest.process.pid}/status").read_text()
        assert re.search(r"^CapEff:\t0+$", status, re.M)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
        assert re.search(r"^Seccomp_filters:\t[2-9]$", status, re.M), "the launcher's, and QEMU's own"
        assert re.search(r"^Uid:\t107\t107\t107\t107$", status, re.M)
        assert guest.power_off() == 0


def test_a_guest_on_a_plain_tap_reaches_its_pod(lab: Lab, plugin: Plugin, image: Image) -> None:
    pod = lab.pod()
    mac = _attach(plugin, pod, device="tap")
    pod.ip("address add 10.77.0.1/24 dev net1")
    with _guest(plugin, image, pod, [Nic(mac, ADDRESS)]) as guest:
        guest.ready()
        assert guest.ping("10.77.0.1")


def test_two_nics_of_two_kinds(lab: Lab, plugin: Plugin, image: Image) -> None:
    pod = lab.pod()
    macs = [
        _attach(plugin, pod, "net1", source="eth1", mode="bridge"),
        _attach(plugin, pod, "net2", source="br0"),
    ]
    with _guest(plugin, image, pod, [Nic(macs[0], ADDRESS), Nic(macs[1])]) as guest:
        guest.ready()
        assert guest.ping(PEER)
        assert macs == guest.must("cat /sys/class/net/eth*/address").split()


def test_the_mtu_reaches_the_guest(lab: Lab, plugin: Plugin, image: Image) -> None:
    pod = lab.pod()
    mac = _attach(plugin, pod, source="eth1", mode="bridge", mtu=1300)
    with _guest(plugin, image, pod, [Nic(mac, ADDRESS)]) as guest:
        guest.ready()
        assert guest.must("cat /sys/class/net/eth0/mtu") == "1300\n"


def test_ipams_addresses_reach_the_guest_by_a_seed(
    lab: Lab, plugin: Plugin, image: Image, reference_plugins: Path
) -> None:
    pod = lab.pod()
    ipam = {
        "type": "static",
        "addresses": [{"address": "10.77.0.9/24", "gateway": PEER}],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {"nameservers": ["10.77.0.53"]},
    }
    conf = config(source="eth1", mode="bridge", ipam=ipam)
    answer = plugin("ADD", conf, netns=pod, env={"CNI_PATH": str(reference_plugins)}).ok()
    mac = answer["interfaces"][0]["mac"]
    with _guest(plugin, image, pod, [Nic(mac)], "--seed", words=("seed",)) as guest:
        guest.ready()
        network = json.loads(guest.must("cat /seed/network-config"))
    assert network["version"] == 2
    (card,) = network["ethernets"].values()
    assert (card["match"], card["addresses"]) == ({"macaddress": mac}, ["10.77.0.9/24"])
    assert card["routes"] == [{"to": "0.0.0.0/0", "via": PEER}]
    assert card["nameservers"]["addresses"] == ["10.77.0.53"]


def test_supervised_a_signal_powers_the_guest_down(lab: Lab, plugin: Plugin, image: Image) -> None:
    """This guest's init ignores the power button, so the deadline ends it, with QEMU's own status."""
    pod = lab.pod()
    mac = _attach(plugin, pod, source="eth1", mode="bridge")
    with _guest(plugin, image, pod, [Nic(mac, ADDRESS)], "--supervise", "--deadline", "1") as guest:
        guest.ready()
        guest.process.terminate()
        assert guest.process.wait(LIMIT) == 0
