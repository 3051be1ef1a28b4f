"""A claim's attachment has what one by CNI can have: a profile, a wait for its guest, addresses, the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni.port import filter as filters
from tests.agent import test_broker as broker
from tests.fakeipam import FakeIpam

if TYPE_CHECKING:
    from lab.wire import Lab
    from tests.agent.claims.conftest import Node


def test_a_profile_of_policy_and_claim(node: Node, lab: Lab) -> None:
    node.policy(port={"macSpoofCheck": True})
    pod, claim = lab.pod(), node.prepare(port={"dhcpServer": False})
    node.hook(claim, pod).ok()
    record = node.record(claim)
    assert record
    assert record.port
    assert (record.port.mac_spoof_check, record.port.dhcp_server) == (True, False)
    table = filters.table(record.ifname)
    assert "drop" in pod.run(["nft", "list", "table", "netdev", table]).stdout


def test_it_waits_for_its_guest(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    record = node.record(claim)
    assert record
    assert (record.mode, record.handover) == ("bridge", True)
    assert pod.links()[record.ifname]["linkinfo"]["info_data"]["mode"] == "vepa"


def test_the_address_of_a_delegate(node: Node, lab: Lab) -> None:
    ipam = FakeIpam(node.folder / "bin")
    pod, claim = lab.pod(), node.prepare(ipam=ipam.config, addressing="link")
    node.hook(claim, pod).ok()
    assert "10.9.0.5/24" in pod.run(["ip", "-br", "address", "show", claim.devices[0].ifname]).stdout
    assert ipam.leases() == {f"{claim.uid}-{claim.devices[0].ifname}"}


def test_its_launcher_gets_the_fd_by_the_broker(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    record = node.record(claim)
    assert record
    [given] = broker.once(node.agent, pod)
    assert (given["ifname"], given["mac"], given["fds"]) == (record.ifname, record.mac, 1)
