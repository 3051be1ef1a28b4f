"""An IPAM plugin that fails, hangs, dies or talks nonsense: its lease is given back, and nothing else is left."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from cni import plugin as product
from cni import spec
from cni.attach.call import Request
from lab.wire import NIC
from tests.hanging import deadline_after
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Netns
    from tests.faults.baseline import Baseline, Leaser
    from tests.runner import Answer, Plugin

CONF = config(source=NIC, ipam={"type": "leaser"})


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("fail", 11),
        ("mute", spec.DELEGATE_FAILED),
        ("junk", spec.DECODING_FAILURE),
        ("list", spec.DECODING_FAILURE),
        ("noip", spec.DECODING_FAILURE),
    ],
)
def test_a_bad_delegate(
    *, plugin: Plugin, leaser: Leaser, pod: Netns, baseline: Baseline, how: str, code: int
) -> None:
    leaser.behave(how)
    assert "leaser" in plugin("ADD", CONF, netns=pod).error(code)["msg"]
    assert leaser.log() == ["ADD", "DEL"]
    baseline.holds()


@pytest.mark.parametrize("how", ["hang", "linger"])
def test_a_delegate_that_does_not_end(
    plugin: Plugin, leaser: Leaser, pod: Netns, baseline: Baseline, how: str
) -> None:
    """Killed at the deadline with all that it started: it hangs, or what it started holds its stdout."""
    leaser.behave(how)
    request = Request(plugin.environment("ADD", pod), json.dumps(CONF).encode())
    given = plugin.given(delegate_seconds=0.2)
    began = time.monotonic()
    with deadline_after(leaser.folder / "hanging"):
        response = plugin.node.call(lambda: product.handle(request, given))
    assert time.monotonic() - began < 3600  # not the hour that it would sleep
    assert response.error
    assert response.error.code == spec.DELEGATE_FAILED
    assert leaser.log() == ["ADD", "DEL"]
    baseline.holds()


def test_a_delegate_that_cannot_delete(
    handle: Callable[..., Answer], leaser: Leaser, pod: Netns, baseline: Baseline
) -> None:
    """Our part is done all the same, its error is reported, and DEL may be repeated until it can."""
    handle("ADD", CONF, netns=pod).ok()
    leaser.behave("faildel")
    for _ in range(2):
        assert "the leases are locked" in handle("DEL", CONF, netns=pod).error(100)["msg"]
        assert "net1" not in pod.links()
    leaser.behave("")
    handle("DEL", CONF, netns=pod).ok()
    baseline.holds()


def test_a_delegate_that_is_gone(
    handle: Callable[..., Answer], leaser: Leaser, pod: Netns, baseline: Baseline
) -> None:
    handle("ADD", CONF, netns=pod).ok()
    program = leaser.folder / "leaser"
    away = program.rename(leaser.folder / "away")
    handle("DEL", CONF, netns=pod).error(spec.INVALID_NETWORK_CONFIG)
    assert "net1" not in pod.links()
    away.rename(program)
    handle("DEL", CONF, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize("previous", ["x", 3, [], {"interfaces": "x"}, {"ips": [{"address": "x"}]}])
def test_a_malformed_prev_result(
    handle: Callable[..., Answer], leaser: Leaser, pod: Netns, baseline: Baseline, previous: object
) -> None:
    conf = CONF | {"prevResult": previous}
    for command in ("ADD", "CHECK"):
        answer = handle(command, conf, netns=pod)
        assert answer.error(answer.document["code"])["code"] in (6, 7)
    baseline.holds()
    handle("ADD", CONF, netns=pod).ok()
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()
