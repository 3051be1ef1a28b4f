"""Attachments for tests on the real kernel: made by the installed executable, opened by the product's tapdev."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from cni.kernel import netns, tapdev
from cni.state.record import Record
from cni.state.store import in_netns
from tests.runner import Plugin, config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.wire import Netns


@dataclass(frozen=True)
class Attached:
    """One attachment: the pod, the record that ADD left, the fds of its queues, and ADD's result."""

    pod: Netns
    record: Record
    fds: list[int]
    result: dict[str, Any]

    @property
    def fd(self) -> int:
        """The fd of an attachment with one queue."""
        (fd,) = self.fds
        return fd

    def link(self) -> dict[str, Any]:
        """What `ip -d link` says of it."""
        return self.pod.links()[self.record.ifname]


def open_queues(pod: Netns, record: Record, queues: int = 1) -> list[int]:
    """tapdev's fds; the caller closes them."""
    namespace = netns.open_path(str(pod.path))
    try:
        return tapdev.open_queues(namespace, record, queues)
    finally:
        os.close(namespace)


def records(plugin: Plugin, pod: Netns) -> list[Record]:
    """The records that are of that pod."""
    namespace = netns.open_path(str(pod.path))
    try:
        return in_netns(plugin.state, netns.identity(namespace))
    finally:
        os.close(namespace)


@pytest.fixture
def attach(plugin: Plugin) -> Iterator[Callable[..., Attached]]:
    """attach(pod, args="", container=…, opened=True, **config): ADD, then open its queues; closed by the fixture."""
    with contextlib.ExitStack() as stack:

        def attach(
            pod: Netns,
            *,
            args: str = "",
            container: str = "c1",
            ifname: str = "net1",
            opened: bool = True,
            **fields: Any,
        ) -> Attached:
            result = plugin(
                "ADD", config(**fields), netns=pod, args=args, container=container, ifname=ifname
            ).ok()
            for each in result["interfaces"]:
                if "sandbox" not in each:  # a bridge forwards to a port once it has a carrier
                    plugin.node.wait_until_up(each["name"])
            (record,) = [each for each in records(plugin, pod) if each.ifname == ifname]
            fds = open_queues(pod, record, record.queues) if opened else []
            for fd in fds:
                stack.callback(os.close, fd)
            if opened:  # a tap gets a carrier with its first reader, and drops what comes before
                pod.wait_until_up(ifname)
            return Attached(pod, record, fds, result)

        yield attach
