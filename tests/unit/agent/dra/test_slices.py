"""slices.py: what the API server allows in a slice, and which devices a scheduler may choose."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from cni.agent.dra.slices import MOST, SEVERAL, Node, chunks, count, pool
from cni.config import policy
from cni.kernel.lldp import Neighbour
from cni.kernel.rtnl import IFF_LOWER_UP, IFF_RUNNING, IFF_UP
from cni.state import deviceid
from tests.unit.agent.deviceplugin.test_devices import link

NIC = "eth1"
ATTRIBUTE = re.compile(r"([a-z0-9.-]{1,63}/)?[A-Za-z_][A-Za-z0-9_]{0,31}")


def interfaces(*entries: dict[str, Any]) -> tuple[policy.Interface, ...]:
    return policy.of("f", {"interfaces": [*entries]}).interfaces


def entry(name: str = "data", dev: str = NIC, **more: Any) -> dict[str, Any]:
    return {"name": name, "source": {"dev": dev}, **more}


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """With a NIC on PCI whose speed is 10 Gbit/s."""
    device = tmp_path / "devices/pci0000:00/0000:00:05.0"
    (device / f"net/{NIC}").mkdir(parents=True)
    (tmp_path / "bus/pci").mkdir(parents=True)
    (tmp_path / "class/net").mkdir(parents=True)
    (device / "subsystem").symlink_to(tmp_path / "bus/pci")
    (device / f"net/{NIC}/device").symlink_to(device)
    (device / f"net/{NIC}/speed").write_text("10000\n")
    (device / "numa_node").write_text("1\n")
    (tmp_path / f"class/net/{NIC}").symlink_to(device / f"net/{NIC}")
    return tmp_path


def node(sysfs: Path, **more: Any) -> Node:
    return Node({NIC: link(NIC, 2)}, str(sysfs), **more)


def values(device: dict[str, Any]) -> dict[str, Any]:
    return {key: next(iter(value.values())) for key, value in device["attributes"].items()}


def test_attributes(sysfs: Path) -> None:
    found = pool(interfaces(entry(modes=["vepa", "private"], vlans=[100, 200], capacity=2)), node(sysfs))
    assert [each["name"] for each in found.devices] == ["data-0", "data-1"]
    assert values(found.devices[1]) == {
        "interface": "data",
        "source": NIC,
        "type": "ethernet",
        "bridge": False,
        "vepa": True,
        "pepa": True,
        "vlans": ",100,200,",
        "mtu": 1500,
        "carrier": True,
        "speed": 10000,
        "numaNode": 1,
        "switch": "",
        "switchPort": "",
        "resource.kubernetes.io/pciBusID": "0000:00:05.0",
        "resource.kubernetes.io/pcieRoot": "pci0000:00",
        "k8s.cni.cncf.io/deviceID": "data-1",
        "k8s.cni.cncf.io/resourceName": "vmtap.dev/data",
    }


@pytest.mark.parametrize("flags", [0, IFF_UP, IFF_UP | IFF_LOWER_UP, IFF_LOWER_UP | IFF_RUNNING])
def test_a_link_without_a_carrier_is_shown_so(tmp_path: Path, flags: int) -> None:
    there = Node({NIC: link(NIC, 2, flags=flags)}, str(tmp_path))
    [device] = pool(interfaces(entry(capacity=1)), there).devices
    assert values(device)["carrier"] is False
    assert (values(device)["speed"], values(device)["numaNode"]) == (0, -1)


def test_the_switch_of_a_nic(sysfs: Path) -> None:
    there = node(sysfs, neighbours={NIC: Neighbour("leaf-12", "é" * 40), "eth9": Neighbour("other", "1")})
    [device] = pool(interfaces(entry(capacity=1)), there).devices
    assert (values(device)["switch"], values(device)["switchPort"]) == ("leaf-12", "é" * 32)


def test_what_the_server_would_refuse_is_not_sent(sysfs: Path) -> None:
    long = "A" * 50
    entries = interfaces(entry(long, vlans=list(range(1, 60)), capacity=130), entry("x", capacity=MOST))
    found = pool(entries, node(sysfs))
    assert len(found.devices) == MOST
    assert "lower the capacities" in found.left_out["*"][1]
    assert len({each["name"] for each in found.devices}) == MOST
    for each in found.devices[:140]:
        assert len(each["name"]) <= 63
        assert len(each["attributes"]) <= 32
        assert all(ATTRIBUTE.fullmatch(key) for key in each["attributes"])
        assert all(len(value) <= 64 for value in values(each).values() if isinstance(value, str))
    assert values(found.devices[0])["vlans"] == "many"
    assert [len(chunk) for chunk in chunks(found.devices)] == [128] * 32
    assert chunks([]) == [[]]


def test_a_source_that_is_away_has_no_devices(sysfs: Path) -> None:
    found = pool(interfaces(entry("gone", "eth9"), entry()), node(sysfs))
    assert {values(each)["interface"] for each in found.devices} == {"data"}
    assert found.left_out == {"gone": ("eth9 is not on this node", "plug it in, or correct the policy")}


@pytest.mark.parametrize(
    ("attached", "claims", "offered"),
    [
        ((), (), [0, 1, 2, 3]),
        ((0,), (), [0, 1, 2]),  # by the device plugin
        ((), (3,), [0, 1, 2, 3]),  # the claim's own stays
        ((0, 1), (3, 2), [2, 3]),
        ((5,), (3,), [0, 1, 3]),  # the capacity was lowered
        ((), (7, 6, 5), [0]),
        ((0, 1, 2, 3, 4), (), []),
    ],
)
def test_one_capacity_for_the_device_plugin_and_claims(
    sysfs: Path, attached: tuple[int, ...], claims: tuple[int, ...], offered: list[int]
) -> None:
    """Each claim's device has its number, as has the device that it has reserved."""
    indexes = [deviceid.ifindex("data", number) for number in (*attached, *claims)]
    elsewhere = [7, deviceid.ifindex("other", 0), 0x10000000]
    claimed = [f"data-{number}" for number in claims]
    there = node(sysfs, claimed=claimed, indexes=[*indexes, *elsewhere])
    found = pool(interfaces(entry(capacity=4)), there).devices
    assert [each["name"] for each in found] == [f"data-{number}" for number in offered]


@pytest.mark.parametrize(
    ("attached", "shared", "numbered", "slots"),
    [
        ((), 0, 0, 4),
        ((0,), 2, 0, 3),  # by the device plugin
        ((), 0, 1, 3),  # a claim from before the API server had the feature
        ((0, 1), 1, 1, 1),
        ((0, 1, 2, 3), 0, 0, None),
        ((5,), 3, 0, 3),  # the capacity was lowered
    ],
)
def test_one_device_with_slots(
    sysfs: Path, attached: tuple[int, ...], shared: int, numbered: int, slots: int | None
) -> None:
    held = [*attached, *range(10, 10 + shared + numbered)]
    there = node(
        sysfs,
        claimed=["data-shared"] * shared + ["data-0"] * numbered,
        indexes=[deviceid.ifindex("data", number) for number in held],
    )
    devices = pool(interfaces(entry(capacity=4)), there, shares=True).devices
    assert count(devices) == (slots or 0)
    if slots is None:
        assert devices == []
        return
    [device] = devices
    assert (device["name"], device[SEVERAL]) == ("data-shared", True)
    policy = {"default": "1", "validValues": ["1"]}
    assert device["capacity"] == {"slots": {"value": str(slots), "requestPolicy": policy}}
    assert values(device)["k8s.cni.cncf.io/deviceID"] == "data-shared"
    assert values(device)["carrier"] is True


class TestVirtualFunctions:
    @pytest.fixture
    def vfs(self, sysfs: Path) -> Path:
        """Four VFs, each with a link."""
        pf = sysfs / "devices/pci0000:00/0000:00:05.0"
        (pf / "sriov_totalvfs").write_text("8\n")
        (pf / "driver").mkdir()
        for number in range(4):
            vf = sysfs / f"devices/pci0000:00/0000:00:06.{number}"
            (vf / f"net/vf{number}").mkdir(parents=True)
            (vf / "numa_node").write_text("1\n")
            (pf / f"virtfn{number}").symlink_to(vf)
            os.symlink(vf / f"net/vf{number}", sysfs / f"class/net/vf{number}")
        return sysfs

    def found(self, sysfs: Path, **more: Any) -> list[str]:
        names = [NIC, *(f"vf{number}" for number in range(4))]
        there = Node({name: link(name, at) for at, name in enumerate(names, 2)}, str(sysfs), **more)
        devices = pool(interfaces(entry(type="sr-iov")), there).devices
        for each in devices:
            number = each["name"].rpartition("-")[2]
            assert values(each)["resource.kubernetes.io/pciBusID"] == f"0000:00:06.{number}"
            assert values(each)["resource.kubernetes.io/pcieRoot"] == "pci0000:00"
        return [each["name"] for each in devices]

    def test_each_is_a_device(self, vfs: Path) -> None:
        assert self.found(vfs) == ["data-0", "data-1", "data-2", "data-3"]
        there = Node({NIC: link(NIC, 2)}, str(vfs))
        found = pool(interfaces(entry(type="sr-iov")), there, shares=True).devices
        assert not any(SEVERAL in each for each in found)

    def test_one_that_a_cni_attachment_has_is_left_out(self, vfs: Path) -> None:
        assert self.found(vfs, held={"0000:00:06.0": "a-1"}) == ["data-1", "data-2", "data-3"]

    def test_one_that_a_claim_has_stays(self, vfs: Path) -> None:
        held = {"0000:00:06.0": "a-1", "0000:00:06.2": "c-1"}
        assert self.found(vfs, held=held, attached={"c-1"}, claimed={"data-3"}) == [
            "data-1",
            "data-2",
            "data-3",
        ]

    def test_one_that_was_taken_from_a_claim_costs_another(self, vfs: Path) -> None:
        held = {"0000:00:06.3": "a-1", "0000:00:06.0": "c-1"}
        assert self.found(vfs, held=held, attached={"c-1"}, claimed={"data-3"}) == [
            "data-0",
            "data-1",
            "data-3",
        ]

    def test_one_that_is_not_there_yet_has_no_address(self, vfs: Path) -> None:
        for number in range(4):
            (vfs / f"devices/pci0000:00/0000:00:05.0/virtfn{number}").unlink()
        there = Node({NIC: link(NIC, 2)}, str(vfs))
        [device] = pool(interfaces(entry(type="sr-iov", vfs=1)), there).devices
        assert "resource.kubernetes.io/pciBusID" not in device["attributes"]
