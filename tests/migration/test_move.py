"""A VM moves from node a to node b: frames are counted, not timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.migration.conftest import VM, Bed, arp, rarp
from tests.waiting import until

if TYPE_CHECKING:
    from tests.migration.conftest import Attached, Guest


def heard_elsewhere(target: Attached, source: Guest) -> bool:
    source.send(arp(VM))
    return target.elsewhere and target.mode == "vepa"


def test_a_migration(bed: Bed) -> None:
    beside_source, beside_target = bed.a.neighbour(), bed.b.neighbour()
    source = bed.a.attach()
    assert source.mode == "vepa"
    running = bed.guest(source, rarp(VM))
    until(lambda: source.mode == "bridge", "the guest to be heard")
    everybody = [beside_source, beside_target, bed.machine]
    assert [each.lost() for each in everybody] == [0, 0, 0]

    target = bed.b.attach()
    until(lambda: heard_elsewhere(target, running), "the agent to hear that the VM is on the other node")
    assert [each.lost(frames=20) for each in everybody] == [0, 0, 0]

    running.stop()
    arrived = bed.guest(target, rarp(VM))
    until(lambda: (source.mode, target.mode) == ("vepa", "bridge"), "both agents to hear the announcement")
    assert [each.lost(frames=20) for each in everybody] == [0, 0, 0]
    source.delete()
    assert [each.lost() for each in everybody] == [0, 0, 0]
    arrived.stop()
