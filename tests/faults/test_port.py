"""An ADD whose profile the kernel refuses: nothing passes, and nothing is left, with or without nf_tables."""

from __future__ import annotations

import errno
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from cni.kernel import nft
from cni.kernel.bridge_port import veth_names
from cni.kernel.rtnl import IFF_UP
from cni.port import guard, limit
from lab.wire import BRIDGE, NIC
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from socket import socket

    from cni.kernel.rtnl import Rtnl
    from cni.state.record import Record
    from lab.wire import Netns
    from tests.faults.baseline import Baseline
    from tests.runner import Answer, Plugin

PORT = {"macSpoofCheck": True, "rate": {"in": "1Gbit", "out": "1Gbit"}}
CASES: dict[str, dict[str, Any]] = {"macvtap": {"source": NIC}, "tap": {"source": BRIDGE, "device": "tap"}}


@contextmanager
def _missing() -> Iterator[socket]:
    """As nft.opened() on a kernel without nf_tables."""
    raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")
    yield


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOBUFS, "No buffer space available")


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_without_nf_tables(
    handle: Callable[..., Answer], pod: Netns, baseline: Baseline, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    conf = config(**CASES[case], port=PORT)
    monkeypatch.setattr(nft, "opened", _missing)
    refused = handle("ADD", conf, netns=pod).error(100)
    assert "the kernel has no nf_tables" in refused["msg"]
    assert "undoing" not in refused.get("details", "")
    baseline.holds()
    handle("DEL", conf, netns=pod).ok()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("module", "function"), [(nft, "change"), (limit, "shape")], ids=["filters", "limits"]
)
def test_a_kernel_that_refuses_a_part(
    *,
    handle: Callable[..., Answer],
    pod: Netns,
    baseline: Baseline,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    module: object,
    function: str,
) -> None:
    conf = config(**CASES[case], port=PORT)
    with monkeypatch.context() as context:
        if module is nft:
            real = nft.change
            context.setattr(
                nft, "change", lambda to, parts: real(to, parts) if len(parts) == 1 else _refuse()
            )
        else:
            context.setattr(module, function, _refuse)
        handle("ADD", conf, netns=pod).error(100)
    baseline.holds()
    handle("ADD", conf, netns=pod).ok()
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize("case", CASES)
def test_a_del_without_a_record(
    handle: Callable[..., Answer], plugin: Plugin, pod: Netns, baseline: Baseline, case: str
) -> None:
    conf = config(**CASES[case], port=PORT)
    handle("ADD", conf, netns=pod).ok()
    shutil.rmtree(plugin.state)
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize("case", CASES)
def test_the_link_is_down_until_the_profile_is_in_force(
    handle: Callable[..., Answer], pod: Netns, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Even for an fd that somebody opens in between, no frame passes before the filters are there."""
    conf = config(**CASES[case], port=PORT)
    states: list[str] = []
    real = guard.put

    def put(record: Record, rtnl: Rtnl) -> None:
        name = record.ifname if record.device == "macvtap" else veth_names(record.ifindex)[0]
        for when in ("before", "after"):
            link = rtnl.link(name=name)
            assert link
            states.append(f"{when}: {'up' if link.flags & IFF_UP else 'down'}")
            if when == "before":
                real(record, rtnl)

    monkeypatch.setattr(guard, "put", put)
    handle("ADD", conf, netns=pod).ok()
    assert states == ["before: down", "after: down"]
    handle("DEL", conf, netns=pod).ok()
