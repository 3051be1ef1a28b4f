"""switches.py: the switch ports that LLDP frames state become attributes of the slices."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

import pytest

from cni.agent.dra.switches import Switches
from cni.kernel.lldp import Neighbour
from lab.wire import NIC
from tests.ctl.conftest import announced, lldp_frame
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab

LEAF = Neighbour("leaf-12", "Eth1/7")


@pytest.fixture
def switches(lab: Lab) -> Iterator[Switches]:
    """Those of the node, whose NIC is listened on."""
    made = Switches()
    lab.node.call(lambda: made.listen({NIC: lab.node.links()[NIC]["ifindex"]}))
    yield made
    made.close()


def heard(switches: Switches) -> None:
    """Wait for frames, and read them until there is a change."""
    poll = select.poll()
    poll.register(switches, select.POLLIN)
    for _ in range(100):
        assert poll.poll(LIMIT * 1000)
        if switches.take():
            return
    raise AssertionError("no change")


def test_a_neighbour_is_known_until_it_ends(lab: Lab, switches: Switches) -> None:
    with announced(lab, lldp_frame()):
        heard(switches)
    assert switches.neighbours() == {NIC: LEAF}
    assert not switches.take()
    last = lldp_frame().replace(b"\x06\x02\x00\x78", b"\x06\x02\x00\x00")  # no time to live
    with announced(lab, last):
        heard(switches)
    assert switches.neighbours() == {}


def test_a_nic_that_was_replaced_has_no_neighbour(lab: Lab, switches: Switches) -> None:
    with announced(lab, lldp_frame()):
        heard(switches)
    lab.node.call(lambda: switches.listen({NIC: 0x7FFFFFF, "gone": 1}))
    assert switches.neighbours() == {}
    switches.listen({})
    assert not switches.take()


def test_frames_that_are_none_are_read_and_forgotten(lab: Lab, switches: Switches) -> None:
    broken = [lldp_frame()[:length] for length in (14, 16, 20, 30)]
    with announced(lab, *broken, lldp_frame()):
        heard(switches)
    assert switches.neighbours() == {NIC: LEAF}
