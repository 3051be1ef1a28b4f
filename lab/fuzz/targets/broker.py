"""A launcher's request: broker.parse of its line, and broker.choose among the attachments of its pod."""

from __future__ import annotations

from dataclasses import replace

from cni.agent import broker
from cni.errors import CniError
from cni.spec import DECODING_FAILURE, INVALID_ENVIRONMENT, NO_ATTACHMENT
from cni.state.record import Record
from lab.fuzz import claims
from lab.fuzz.targets import Target

_ONE = Record(
    network="dataplane",
    container_id="c0ffee",
    ifname="net1",
    netns="/run/netns/pod",
    netns_id=(4, 4026531840),
    nsid=0,
    device="macvtap",
    ifindex=7,
    mac="02:00:00:00:00:01",
    mtu=1500,
    queues=2,
    boot_id="",
)
_THERE = [_ONE, replace(_ONE, ifname="net2", queues=252)]


def run(data: bytes) -> None:
    """Parse data as a request; choose what it asks for among two attachments."""
    try:
        request = broker.parse(data)
    except CniError as error:
        claims.refused(error, (DECODING_FAILURE,))
        return
    claims.typed(request)
    assert len({*request.ifnames}) == len(request.ifnames)
    try:
        chosen = broker.choose(_THERE, request)
    except CniError as error:
        claims.refused(error, (INVALID_ENVIRONMENT, NO_ATTACHMENT))
        return
    names = [record.ifname for record, _ in chosen]
    assert names == list(request.ifnames or ("net1", "net2"))
    assert all(1 <= queues <= record.queues for record, queues in chosen)
    assert sum(queues for _, queues in chosen) <= 253


TARGET = Target(run, words=("ifnames", "queues", "shared", "open", "net1", "net2"), json=True)
