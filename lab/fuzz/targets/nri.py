"""What a container runtime sends to the NRI plugin: the messages of a channel's bytes, and each as a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni.agent.nri.client import Client
from cni.agent.nri.connection import MOST, PLUGIN, ProtocolError, messages
from lab.fuzz.targets import Target

if TYPE_CHECKING:
    from cni.agent.nri.client import Pod


class _Nothing:
    def run(self, pod: Pod) -> None:
        assert isinstance(pod.pid, int)

    def stop(self, pod: Pod) -> None: ...

    def synchronize(self, pods: list[Pod]) -> None: ...


def run(data: bytes) -> None:
    """Take the messages of data; answer each, and data itself, as a call."""
    client = Client("/nowhere", _Nothing())
    unread = bytearray(data)
    calls = [data]
    try:
        calls += [message.data for message in messages(PLUGIN, unread)]
    except ProtocolError:
        assert any(byte for byte in unread[:4])
    assert sum(map(len, calls)) <= 2 * len(data)
    assert len(unread) < MOST
    for call in calls:
        answer = client.answer(call)
        assert not (answer.status.code and answer.payload)
        assert answer.status.code in (0, 12, 13), answer


TARGET = Target(
    run,
    words=("nri.pkg.api.v1alpha1.Plugin", "Configure", "Synchronize", "StateChange", "Shutdown", "network"),
    most_bytes=1 << 12,
)
