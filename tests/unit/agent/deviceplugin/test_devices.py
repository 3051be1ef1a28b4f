"""devices.py: what is offered, in what health, on which NUMA node; what discovery finds; what is preferred."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.agent.deviceplugin.devices import (
    Device,
    Held,
    Offer,
    devices,
    offers,
    preferred,
    state,
    suitable,
)
from cni.config.policy import Functions, Interface
from cni.kernel.rtnl import IFF_LOOPBACK, IFF_LOWER_UP, IFF_RUNNING, IFF_UP, Link
from cni.kernel.vf_settings import VfSettings
from cni.state import deviceid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GOOD = IFF_UP | IFF_RUNNING | IFF_LOWER_UP
ETHER = 1


def link(
    name: str,
    index: int,
    *,
    kind: str | None = None,
    flags: int = GOOD,
    arphrd: int = ETHER,
    lower: int | None = None,
    lower_nsid: int | None = None,
    master: int | None = None,
) -> Link:
    return Link(
        *(index, name, arphrd, flags, "02:00:00:00:00:01", 1500),
        kind=kind,
        lower=lower,
        lower_nsid=lower_nsid,
        master=master,
    )


def links(*all_of: Link) -> dict[str, Link]:
    return {each.name: each for each in all_of}


def interface(name: str, type: str = "ethernet", capacity: int | None = None) -> Interface:
    return Interface(name, "eth1", type, None, capacity)


@pytest.mark.parametrize(
    ("capacity", "offered"), [(None, deviceid.DEFAULT_CAPACITY), (1, 1), (deviceid.MOST, deviceid.MOST)]
)
def test_capacity(capacity: int | None, offered: int) -> None:
    assert offers([interface("data", capacity=capacity)]) == ([Offer("data", ("eth1",), offered)], {})


def test_vmdq_is_offered_as_ethernet_is() -> None:
    assert offers([interface("data", "vmdq")]) == offers([interface("data")])


@pytest.mark.parametrize(("capacity", "most"), [(None, deviceid.MOST), (5, 5)])
def test_virtual_functions_are_offered_of_a_pool(capacity: int | None, most: int) -> None:
    entry = Interface("fast", "pf0", "sr-iov", None, capacity, Functions(("pf0", "pf1"), 4, VfSettings()))
    assert offers([entry]) == ([Offer("fast", ("pf0", "pf1"), most, virtual=True, vfs=4)], {})


@pytest.mark.parametrize("name", ["a.", "a-", "a_"])
def test_a_name_that_is_no_resources(name: str) -> None:
    offered, left = offers([interface(name)])
    assert not offered
    assert name in left


# NIC, bond, VLAN, bridge: as the kernel's RTM_NEWLINK describes them; the lab's kernel has no bonds and VLANs.
NIC = link("eth1", 2)
NIC2 = link("eth2", 3)
SLAVES = (link("eth3", 4, master=6), link("eth4", 5, master=6))
BOND = link("bond0", 6, kind="bond")
VLAN = link("bond0.7", 7, kind="vlan", lower=6)
BRIDGE = link("br0", 8, kind="bridge")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (GOOD, ""),
        (IFF_UP | IFF_LOWER_UP, "not running"),
        (IFF_UP, "no carrier"),
        (0, "is down"),
        (IFF_RUNNING | IFF_LOWER_UP, "is down"),
    ],
)
def test_health(flags: int, why: str, tmp_path: Path) -> None:
    found = state("eth1", links(link("eth1", 2, flags=flags)), str(tmp_path))
    assert (why in found.fault) if why else found == Device()
    assert bool(found.next_step) == bool(why)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "not on this node" in state("eth9", links(NIC), str(tmp_path)).fault


def test_a_source_by_its_altname(tmp_path: Path) -> None:
    assert state("uplink", links(replace(NIC, altnames=("uplink",))), str(tmp_path)) == Device()


def test_a_bridge_without_a_port_carries_nothing(tmp_path: Path) -> None:
    found = state("br0", links(link("br0", 8, kind="bridge", flags=IFF_UP)), str(tmp_path))
    assert "no carrier" in found.fault
    assert "port" in found.next_step


def numa(root: Path, **nodes: int | str) -> str:
    """A sysfs in which these NICs are on these nodes. It is faked: the lab's NICs are veths, and have none."""
    for name, node in nodes.items():
        device = root / "class/net" / name / "device"
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    return str(root)


def test_the_numa_node_of_a_nic(tmp_path: Path) -> None:
    sysfs = numa(tmp_path, eth1=1, eth2=-1, eth3="?")
    assert state("eth1", links(NIC, NIC2), sysfs).node == 1
    assert state("eth2", links(NIC, NIC2), sysfs).node is None, "the kernel does not know"
    assert state("eth3", links(SLAVES[0]), sysfs).node is None
    assert state("eth4", links(SLAVES[1]), sysfs).node is None, "it has no device"


@pytest.mark.parametrize(("second", "node"), [(1, 1), (0, None), (-1, 1)])
def test_the_numa_node_of_what_is_over_nics(second: int, node: int | None, tmp_path: Path) -> None:
    """A bond, and a VLAN on it: where its NICs are, if they are all in one place."""
    sysfs, there = numa(tmp_path, eth3=1, eth4=second, eth1=0), links(NIC, *SLAVES, BOND, VLAN)
    assert state("bond0", there, sysfs).node == node
    assert state("bond0.7", there, sysfs).node == node


def test_links_that_go_round_in_a_circle_have_no_node(tmp_path: Path) -> None:
    there = links(link("a", 2, kind="vlan", lower=3), link("b", 3, kind="vlan", lower=2))
    assert state("a", there, numa(tmp_path)).node is None


def test_a_lower_link_of_another_namespace_is_not_taken_for_one_here(tmp_path: Path) -> None:
    there = links(NIC, link("v0", 9, kind="macvlan", lower=2, lower_nsid=4))
    assert state("v0", there, numa(tmp_path, eth1=1)).node is None


def test_discovery(tmp_path: Path) -> None:
    vf = tmp_path / "class/net/eth1v0/device"
    vf.mkdir(parents=True)
    (vf / "physfn").symlink_to("../pf")
    there = links(
        *(NIC, NIC2, *SLAVES, BOND, VLAN, BRIDGE),
        link("lo", 1, flags=GOOD | IFF_LOOPBACK, arphrd=772),
        link("eth1v0", 10),
        link("port", 11, master=8),
        link("ovs-port", 12, master=99),
        link("veth1a2b", 13, kind="veth", lower=2, lower_nsid=1),
        link("tap0", 14, kind="tun"),
        link("mv0", 15, kind="macvtap", lower=2),
        link("wg0", 16, kind="wireguard", arphrd=65534),
        link("ib0", 17, arphrd=32),
        link("vrf0", 18, kind="vrf"),
        link("eth5", 19, master=18),
        link("odd@name", 20),
        link("down0", 21, flags=0),
    )
    assert suitable(there, str(tmp_path)) == ["bond0", "bond0.7", "down0", "eth1", "eth2", "eth5"]


ids = st.integers(0, 30).map(lambda number: deviceid.format("data", number))


@given(
    st.lists(ids, unique=True),
    st.lists(ids, unique=True, max_size=5),
    st.integers(0, 30),
    st.sets(st.integers(0, 30)),
)
def test_preference(available: list[str], must: list[str], size: int, busy: set[int]) -> None:
    used = {deviceid.ifindex("data", number) for number in busy}
    chosen = preferred(available, must, size, used)
    assert len(set(chosen)) == len(chosen)
    assert chosen[: len(must)] == must
    assert set(chosen) <= {*available, *must}
    assert len(chosen) == max(len(must), min(size, len({*available, *must})))

    def taken(id: str) -> bool:
        parsed = deviceid.parse(id)
        assert parsed
        return parsed[1] in busy

    rest = [taken(id) for id in chosen[len(must) :]]
    assert rest == sorted(rest), "free ones first"
    if any(rest):
        assert all(id in chosen or taken(id) for id in available)


def test_an_id_that_is_none_of_ours_is_preferred_last() -> None:
    assert preferred(["else", "dataMvp1"], [], 1, ()) == ["dataMvp1"]


# Virtual functions. The PFs and VFs are faked, as files of the sysfs that devices.py is told to read: tests/hw has
# emulated ones.


def pf(root: Path, name: str, vfs: int, *, most: int = 7, numa: int = -1) -> None:
    """A PF with VFs that have links, named as it is with v and the number."""
    device = root / "devices" / name
    (device / "net" / name).mkdir(parents=True)
    (device / "sriov_totalvfs").write_text(f"{most}\n")
    (root / "class/net" / name).mkdir(parents=True)
    (root / "class/net" / name / "device").symlink_to(device)
    for number in range(vfs):
        vf(root, name, number, numa=numa)


def vf(root: Path, pf: str, number: int, *, numa: int = -1, driver: str | None = "igbvf") -> None:
    """One VF, or a change of it."""
    device = root / "devices" / f"{pf}:{number}"
    shutil.rmtree(device, ignore_errors=True)
    device.mkdir()
    (device / "numa_node").write_text(f"{numa}\n")
    if driver:
        (device / "driver").symlink_to(f"/bus/pci/drivers/{driver}")
    if driver and driver != "vfio-pci":
        (device / "net" / f"{pf}v{number}").mkdir(parents=True)
    (root / "devices" / pf / f"virtfn{number}").unlink(missing_ok=True)
    (root / "devices" / pf / f"virtfn{number}").symlink_to(device)


@pytest.mark.parametrize(
    ("attached", "claims", "claimed"),
    [
        ((), (), []),
        ((0, 3), (), []),
        ((0,), (3, 1), [1, 3]),
        ((0,), (9, 8), [2, 3]),  # the capacity was lowered: an attached device stays healthy
        ((0, 1, 2), (9, 8, 7), [3]),
    ],
)
def test_as_many_as_claims_have_are_not_the_kubelets(
    tmp_path: Path, attached: tuple[int, ...], claims: tuple[int, ...], claimed: list[int]
) -> None:
    held = {deviceid.ifindex("data", number): "a" for number in attached}
    held |= {deviceid.ifindex("data", number): "c" for number in claims}
    offer = Offer("data", ("eth1",), 4)
    found = devices(offer, links(link("eth1", 2)), str(tmp_path), Held({}, held, {"c"}))
    assert [number for number, each in enumerate(found) if each.claimed] == claimed
    assert not any(each.fault for each in found)


PFS = (link("pf0", 2), link("pf1", 3))
VFS = tuple(
    link(f"{pf}v{number}", 10 * (at + 1) + number)
    for at, pf in enumerate(("pf0", "pf1"))
    for number in range(4)
)
POOL = Offer("fast", ("pf0", "pf1"), deviceid.MOST, virtual=True)


def faults(offer: Offer, root: Path, *there: Link, held: Held | None = None) -> list[str]:
    found = devices(offer, links(*there), str(root), held or Held())
    assert all(bool(each.fault) == bool(each.next_step) for each in found)
    return [each.fault for each in found]


def test_each_virtual_function_of_the_pool_is_a_device(tmp_path: Path) -> None:
    pf(tmp_path, "pf0", 2, numa=0)
    pf(tmp_path, "pf1", 3, numa=1)
    found = devices(POOL, links(*PFS, *VFS), str(tmp_path), Held())
    assert found == (
        *(Device(pf="pf0", node=0, pci=f"pf0:{number}") for number in range(2)),
        *(Device(pf="pf1", node=1, pci=f"pf1:{number}") for number in range(3)),
    )
    assert len(faults(replace(POOL, capacity=4), tmp_path, *PFS, *VFS)) == 4


def test_a_virtual_functions_numa_node_is_the_pfs_where_it_has_none(tmp_path: Path) -> None:
    pf(tmp_path, "pf0", 1)
    (tmp_path / "devices/pf0/numa_node").write_text("1\n")
    (found,) = devices(POOL, links(*PFS, *VFS), str(tmp_path), Held())
    assert found.node == 1


def test_functions_that_an_add_will_make_count(tmp_path: Path) -> None:
    pf(tmp_path, "pf0", 0)
    pf(tmp_path, "pf1", 3)
    assert faults(replace(POOL, vfs=4), tmp_path, *PFS, *VFS) == [""] * 7
    assert faults(POOL, tmp_path, *PFS, *VFS) == [""] * 3, "none are made"


@pytest.mark.parametrize("most", [0, 2])
def test_functions_that_no_add_can_make_are_unhealthy(tmp_path: Path, most: int) -> None:
    pf(tmp_path, "pf0", 0, most=most)
    found = faults(Offer("fast", ("pf0",), 10, virtual=True, vfs=3), tmp_path, *PFS)
    assert found == [f"pf0 can have {most} VFs, and vfs says 3"] * 3


def test_health_follows_each_pf(tmp_path: Path) -> None:
    pf(tmp_path, "pf0", 1)
    pf(tmp_path, "pf1", 2)
    down = link("pf0", 2, flags=IFF_UP)
    assert faults(POOL, tmp_path, down, PFS[1], *VFS) == ["pf0: it has no carrier", "", ""]


def test_functions_keep_their_numbers_where_a_pf_is_away_and_the_policy_says_how_many(tmp_path: Path) -> None:
    pf(tmp_path, "pf1", 2)
    there = (PFS[1], *VFS)
    assert faults(replace(POOL, vfs=2), tmp_path, *there) == ["pf0: it is not on this node"] * 2 + ["", ""]
    assert faults(POOL, tmp_path, *there) == ["", ""]


@pytest.mark.parametrize(
    ("driver", "why"),
    [("vfio-pci", "has the driver vfio-pci"), (None, "has no driver"), ("igbvf", "is under bond0, v7")],
)
def test_a_function_that_no_add_could_take_is_unhealthy(tmp_path: Path, driver: str | None, why: str) -> None:
    pf(tmp_path, "pf0", 2)
    vf(tmp_path, "pf0", 1, driver=driver)
    for upper in ("upper_v7", "upper_bond0", "statistics"):
        (tmp_path / "class/net/pf0v1" / upper).mkdir(parents=True)
    first, second = faults(POOL, tmp_path, *PFS, link("pf0v0", 10), link("pf0v1", 11))
    assert not first
    assert "VF 1 of pf0" in second
    assert why in second


def test_an_attachments_function_is_the_device_that_it_has(tmp_path: Path) -> None:
    pf(tmp_path, "pf0", 2)
    held = Held({"pf0:0": "c1-x", "pf0:1": "c2-x"}, {deviceid.ifindex("fast", 1): "c2-x"})
    first, second = faults(POOL, tmp_path, *PFS, *VFS, held=held)
    assert "held by attachment c1-x" in first, "which has no device of the kubelet"
    assert not second
    vf(tmp_path, "pf0", 1, driver=None)
    assert not faults(POOL, tmp_path, *PFS, *VFS, held=held)[1], "its driver is being bound anew"


PLACES = ["pf0"] * 4 + ["pf1"] * 4


def fast(*numbers: int) -> list[str]:
    return [deviceid.format("fast", number) for number in numbers]


@pytest.mark.parametrize(
    ("available", "must", "size", "used", "chosen"),
    [
        (range(8), (), 1, (), [0]),
        (range(8), (), 4, (), [0, 4, 1, 5]),
        (range(1, 8), (), 1, (), [4]),
        (range(8), (0,), 2, (), [0, 4]),
        ([2, 3, 5, 6, 7], (), 3, (), [5, 2, 6]),
        ([1, 2, 3], (), 2, (), [1, 2]),
        (range(8), (), 2, (0, 1), [4, 5]),
        ([0, 4, 5], (), 3, (4, 5), [0, 4, 5]),
    ],
    ids=[
        "first",
        "in turns",
        "the emptier",
        "beside what must be",
        "evens out",
        "one PF",
        "used",
        "used last",
    ],
)
def test_the_pf_with_the_fewest_taken_goes_first(
    available: Sequence[int], must: Sequence[int], size: int, used: Sequence[int], chosen: list[int]
) -> None:
    indexes = {deviceid.ifindex("fast", number) for number in used}
    assert preferred(fast(*available), fast(*must), size, indexes, PLACES) == fast(*chosen)
