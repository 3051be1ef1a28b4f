"""The kernel notes when a guest has last sent a frame (last_frame.py)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cni.kernel import last_frame
from lab.frames import Frame, collect, packet_socket, write_tap
from lab.wire import NIC
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab
    from tests.netns.conftest import Attached

FOREIGN = "02:00:00:00:00:78"


def test_the_last_frame_of_a_guest(lab: Lab, attach: Callable[..., Attached]) -> None:
    """Frames that the guest receives do not count; a link that is not watched costs an ADD and a DEL nothing."""
    made = attach(lab.pod(), source=NIC, mode="bridge")

    def seconds() -> float | None:
        return made.pod.call(lambda: last_frame.watch("net1"))

    assert seconds() is None, "it is not watched yet"
    with packet_socket(lab.peer, "eth0") as peer:
        peer.send(Frame(made.record.mac, FOREIGN, "to the guest").pack())
        collect({"guest": made.fd}, until="to the guest")
        assert seconds() is None, "it has sent nothing"
        began = time.monotonic()
        write_tap(made.fd, Frame(FOREIGN, made.record.mac, "from the guest"))
        first = seconds()
        assert first is not None
        assert first <= time.monotonic() - began + 0.01
        until(seconds, "the time does not pass", lambda now: now is not None and now > first + 0.1)
        began = time.monotonic()
        write_tap(made.fd, Frame(FOREIGN, made.record.mac, "another"))
        new = seconds()
        assert new is not None
        assert new <= time.monotonic() - began + 0.01, "of the first frame, 0.1 s more have passed"


def test_nothing_is_left(lab: Lab, attach: Callable[..., Attached]) -> None:
    pod = lab.pod()
    made = attach(pod, source=NIC, mode="bridge")
    pod.call(lambda: last_frame.watch("net1"))
    assert tables(made) == 1
    pod.ip("link delete net1")
    pod.call(lambda: last_frame.forget("net1"))
    assert tables(made) == 0
    pod.call(lambda: last_frame.forget("net1"))


def tables(made: Attached) -> int:
    """How many tables the pod's network namespace has."""
    return made.pod.run(["nft", "list", "tables"]).stdout.count("table netdev ")
