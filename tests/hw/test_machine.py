"""The emulated machine itself: has it the NICs that the other tests are about, and do frames pass?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab import hw
from lab.frames import BROADCAST, Frame, collect, packet_socket
from lab.process import run

if TYPE_CHECKING:
    from lab.hw import Root
    from tests.hw.nic import Nic


def test_these_tests_run_inside() -> None:
    assert hw.inside()


def test_virtual_functions_reach_each_other_and_the_wire(node: Root, bare: Nic) -> None:
    bare.make_vfs(2)
    names = [bare.netdev(0), bare.netdev(1)]
    for name in names:
        run(["ip", "link", "set", name, "up"])
    node.wait_until_up(*names)
    sender = node.links()[names[0]]["address"]
    with (
        packet_socket(node, names[0]) as first,
        packet_socket(node, names[1]) as second,
        packet_socket(node, bare.wire) as wire,
    ):
        first.send(Frame(BROADCAST, sender, "to all").pack())
        got = collect({"second": second, "wire": wire}, until="to all")
    assert not any(got.values())
