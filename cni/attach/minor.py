"""Makes a macvtap whose minor no other pod's container may have a device node of (state/minors.py).

A minor cannot be chosen. If the kernel gives one that is another pod's, the link is deleted, macvtaps in a network
namespace of their own take the free minors of other pods, and the link is made again. That namespace ends with its last
fd, so a process that is killed leaves none of them.
"""

from __future__ import annotations

import os
from contextlib import closing

from cni.errors import CniError
from cni.kernel import tapdev
from cni.kernel.parking import Parking
from cni.spec import TRY_AGAIN_LATER
from cni.state import minors
from cni.state.minors import Given

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.attach.call import Call
    from cni.state.record import Record

_ROUNDS = 8
"""How often the link is made again: other pods may end links meanwhile."""


def make(call: Call, record: Record, create: Callable[[], None]) -> tuple[int, int] | None:
    """Make the record's macvtap by create(). Returns its (major, minor); None if nothing needs them.

    If the record has a node, its minor is entered as the pod's. Raises CniError 5 or 11, OSError.
    """
    create()
    # After the create: whoever had the minor entered it before its link could end.
    if not record.node and not call.node.store.minors.all():
        return None
    pod = minors.pod(call.arguments, record)
    device = _device(call, record)
    if device[1] in _others(call, record, pod):
        device = _make_again(call, record, create, pod, device[0])
    if record.node:
        cgroup = call.node.cgroup(pod) if pod and call.node.cgroup else ""
        call.node.store.minors.give(device[1], Given(record.id, record.boot_id, pod, cgroup))
    return device


def _make_again(
    call: Call, record: Record, create: Callable[[], None], pod: str, major: int
) -> tuple[int, int]:
    with closing(Parking()) as parking:
        for _ in range(_ROUNDS):
            others = _others(call, record, pod)
            free = sum(not os.path.lexists(f"/sys/dev/char/{major}:{minor}") for minor in others)
            call.delete_link(call.host, record.ifindex, record.nsid)
            parking.take(free + 1)
            create()
            device = _device(call, record)
            if device[1] not in _others(call, record, pod):
                return device
    raise CniError(
        TRY_AGAIN_LATER, "the kernel gives only minors of which other pods may have device nodes; try again"
    )


def _device(call: Call, record: Record) -> tuple[int, int]:
    assert call.netns is not None  # noqa: S101 - as in link.make
    return tapdev.number(call.netns, record.ifname)[1:]


def _others(call: Call, record: Record, pod: str) -> set[int]:
    """The minors that only another pod may use."""
    return {
        minor
        for minor, given in call.node.store.minors.all().items()
        if given.boot_id == record.boot_id and given.attachment != record.id and (not pod or given.pod != pod)
    }
