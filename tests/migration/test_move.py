"""A VM moves between two nodes: frames are counted, not timed."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

import pytest

from lab.wire import BRIDGE, BRIDGE_UPLINK, NIC
from tests.migration.conftest import VM, around, arp, copied_to, none_lost, rarp, runs_on, switched_over
from tests.waiting import until

if TYPE_CHECKING:
    from typing import Any

    from tests.migration.conftest import Bed

OTHER_VM = "02:00:00:00:00:78"


PORT = {
    "macSpoofCheck": True,
    "ipSpoofCheck": True,
    "addresses": ["10.77.0.7"],
    "dhcpServer": False,
    "routerAdvertisements": False,
    "broadcast": 1000,
    "rate": {"out": "1Gbit", "in": "1Gbit"},
}


@pytest.mark.parametrize("port", [None, PORT], ids=["open", "guarded"])
def test_a_migration(bed: Bed, port: dict[str, Any] | None) -> None:
    """A port's filters let the announcement of the VM pass, and are there while the target waits for it."""
    bed.fields = {"port": port} if port else {}
    everybody = around(bed)
    source, running = runs_on(bed.a)
    none_lost(everybody)
    before, began = bed.a.silences()["left"], time.monotonic()
    target = copied_to(bed.b, running)
    tables = target.pod.run(["nft", "list", "tables"]).stdout
    assert ("vmtap-port-net1" in tables) is bool(port)
    none_lost(everybody, frames=20)
    arrived = switched_over(source, running, target)
    none_lost(everybody, frames=20)
    at_most = time.monotonic() - began
    assert bed.a.silences() == {"left": before + 1, "arrived": 0.0}
    assert bed.b.silences() == {"left": 0.0, "arrived": 1.0}
    source.delete()
    none_lost(everybody)
    arrived.stop()
    target.delete()
    until(
        lambda: bed.a.links()["waiting"] + bed.b.links()["waiting"],
        "a link still waits",
        lambda now: now == 0,
    )
    for node, message in ((bed.a, "the VM has left"), (bed.b, "the VM is here")):
        node.agent.end()
        (*_, line) = [
            each for each in node.agent.log if each["msg"].startswith(message) and each["mac"] == VM
        ]
        assert 0 <= line["silent_seconds"] <= at_most + 0.01, "the kernel counts in ticks of up to 10 ms"


def test_one_that_fails(bed: Bed) -> None:
    everybody = around(bed)
    source, running = runs_on(bed.a)
    target = copied_to(bed.b, running)
    none_lost(everybody)
    target.delete()
    none_lost(everybody, frames=20)
    assert source.mode == "bridge"
    assert not (bed.b.agent.run / "elsewhere" / target.record.id).exists()


def test_one_back_again(bed: Bed) -> None:
    everybody = around(bed)
    first, running = runs_on(bed.a)
    second = copied_to(bed.b, running)
    running = switched_over(first, running, second)
    first.delete()
    third = copied_to(bed.a, running)
    none_lost(everybody)
    switched_over(second, running, third)
    none_lost(everybody, frames=20)
    second.delete()
    none_lost(everybody)


def test_two_vms_at_once_in_both_directions(bed: Bed) -> None:
    everybody = around(bed)
    here, running = runs_on(bed.a)
    there, other_running = runs_on(bed.b, OTHER_VM)
    target, other_target = copied_to(bed.b, running), copied_to(bed.a, other_running, OTHER_VM)
    none_lost(everybody, VM, OTHER_VM)
    switched_over(here, running, target)
    none_lost(everybody, VM, OTHER_VM)
    switched_over(there, other_running, other_target, OTHER_VM)
    none_lost(everybody, VM, OTHER_VM)
    here.delete()
    there.delete()
    none_lost(everybody, VM, OTHER_VM)


@pytest.mark.parametrize("dies", ["target", "source"])
def test_an_agent_is_killed_during_the_copy(bed: Bed, dies: str) -> None:
    everybody = around(bed)
    source, running = runs_on(bed.a)
    target = copied_to(bed.b, running)
    agent = (target if dies == "target" else source).node.agent
    agent.end(signal.SIGKILL)
    none_lost(everybody)
    agent.start()
    none_lost(everybody)
    assert (source.mode, target.mode, target.elsewhere) == ("bridge", "vepa", True)
    switched_over(source, running, target)
    none_lost(everybody)
    source.delete()
    none_lost(everybody)


def test_the_agents_are_killed_after_the_switch_over(bed: Bed) -> None:
    everybody = around(bed)
    source, running = runs_on(bed.a)
    target = copied_to(bed.b, running)
    arrived = switched_over(source, running, target)
    for node in (bed.a, bed.b):
        node.agent.end(signal.SIGKILL)
    none_lost(everybody)
    for node in (bed.a, bed.b):
        node.agent.start()
    none_lost(everybody)
    assert (source.mode, target.mode) == ("vepa", "bridge")
    source.delete()
    arrived.send(arp(VM))
    none_lost(everybody)


def test_both_agents_miss_the_switch_over(bed: Bed) -> None:
    """No frame announces the VM afterwards: both links follow an ordinary ARP request."""
    everybody = around(bed)
    source, running = runs_on(bed.a)
    target = copied_to(bed.b, running)
    for node in (bed.a, bed.b):
        node.agent.end(signal.SIGKILL)
    running.stop()
    arrived = bed.guest(target, rarp(VM))
    for node in (bed.a, bed.b):
        node.agent.start()

    def modes() -> tuple[str, str]:
        arrived.send(arp(VM))
        return source.mode, target.mode

    until(modes, "the links do not follow the VM", lambda seen: seen == ("vepa", "bridge"))
    none_lost(everybody)


@pytest.mark.parametrize("where", ["policy", "config"])
def test_without_handover_frames_are_lost(bed: Bed, where: str) -> None:
    """The control experiment: without it the neighbour of the target loses every frame during the copy."""
    beside_source, beside_target, machine = around(bed)
    source, _ = runs_on(bed.a)
    entry = {"name": "data", "source": {"dev": NIC}, "handover": where != "policy"}
    bed.b.agent.policy.write_text(json.dumps({"interfaces": [entry]}))
    target = bed.b.attach(interface="data", source=None, handover=where != "config")
    assert (target.mode, target.record.handover) == ("bridge", False)
    assert beside_target.lost(frames=3, seconds=1.0) == 3
    none_lost([beside_source, machine])
    target.delete()
    none_lost([beside_source, beside_target, machine])
    assert source.mode == "bridge"


def test_taps_on_linux_bridges(bed: Bed) -> None:
    """The bridges learn where the VM is: there is nothing to wait for."""
    bed.lab.switch.plug("uplink-b", bed.b.netns, BRIDGE_UPLINK, 1500)
    bed.b.netns.ip(
        f"link add {BRIDGE} up type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"link set {BRIDGE_UPLINK} master {BRIDGE}",
    )
    bed.lab.switch.wait_until_up("uplink-b")
    bed.b.netns.wait_until_up(BRIDGE, BRIDGE_UPLINK)
    on_bridge = {"source": BRIDGE, "device": "tap"}
    everybody = [bed.a.neighbour(**on_bridge), bed.b.neighbour(**on_bridge), bed.machine]
    source = bed.a.attach(**on_bridge)
    running = bed.guest(source, rarp(VM))
    none_lost(everybody)
    target = bed.b.attach(**on_bridge)
    assert not target.record.handover
    none_lost(everybody, frames=20)
    running.stop()
    bed.guest(target, rarp(VM))
    none_lost(everybody, frames=20)
    source.delete()
    none_lost(everybody)
