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
from tests.fakeipam import HANG, FakeIpam
from tests.hanging import deadline_after, living
from tests.runner import BIN, config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Netns
    from tests.faults.baseline import Baseline
    from tests.runner import Answer, Plugin

CONF = config(source=NIC, ipam=FakeIpam.config)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("""echo '{"cniVersion": "1.1.0", "code": 11, "msg": "no address left"}'; exit 1""", 11),
        ("exit 3", spec.DELEGATE_FAILED),
        ("echo 'leased!'", spec.DECODING_FAILURE),
        ("echo '[]'", spec.DECODING_FAILURE),
        ("""echo '{"ips": [{"address": "10.6.0.500/24"}]}'""", spec.DECODING_FAILURE),
    ],
)
def test_a_bad_delegate(
    *, plugin: Plugin, ipam: FakeIpam, pod: Netns, baseline: Baseline, script: str, code: int
) -> None:
    ipam.write(ADD=f"lease; {script}")
    assert "'fake'" in plugin("ADD", CONF, netns=pod).error(code)["msg"]
    assert ipam.commands() == ["ADD", "DEL"]
    baseline.holds()


@pytest.mark.parametrize("script", [HANG, "lease; setsid sleep 3600 & touch hanging; wait"])
def test_a_delegate_that_does_not_end(
    plugin: Plugin, ipam: FakeIpam, pod: Netns, baseline: Baseline, script: str
) -> None:
    """Killed at the deadline with all that it started."""
    ipam.write(ADD=script)
    request = Request(plugin.environment("ADD", pod), json.dumps(CONF).encode())
    given = plugin.given(delegate_seconds=0.2)
    began = time.monotonic()
    with deadline_after(ipam.seen / "hanging"):
        response = plugin.node.call(lambda: product.handle(request, given))
    assert time.monotonic() - began < 3600  # not the hour that it would sleep
    assert response.error
    assert response.error.code == spec.DELEGATE_FAILED
    assert ipam.commands() == ["ADD", "DEL"]
    assert living(ipam.folder) == []
    baseline.holds()


def test_a_delegate_that_prints_without_end(
    handle: Callable[..., Answer], ipam: FakeIpam, pod: Netns, baseline: Baseline
) -> None:
    ipam.write(ADD="lease; exec yes")
    assert "more than 256 KiB" in handle("ADD", CONF, netns=pod).error(spec.DELEGATE_FAILED)["msg"]
    assert ipam.commands() == ["ADD", "DEL"]
    baseline.holds()


@pytest.mark.parametrize("copy", [False, True])
def test_vmtap_as_its_own_delegate(
    *, plugin: Plugin, ipam: FakeIpam, pod: Netns, baseline: Baseline, copy: bool
) -> None:
    """It is refused, under its name before anything is made. A copy runs once, as its environment tells it."""
    name = "copied" if copy else "vmtap"
    (ipam.folder / name).write_text(f'#!/bin/sh\necho >> "{ipam.seen}/runs"\nexec "{BIN}/vmtap"\n')
    (ipam.folder / name).chmod(0o755)
    conf = config(source=NIC, ipam={"type": name})
    error = plugin("ADD", conf, netns=pod).error(spec.INVALID_NETWORK_CONFIG)
    assert ("vmtap itself" if copy else "another plugin than vmtap") in error["msg"]
    runs = ipam.seen / "runs"
    assert runs.exists() == copy
    assert not copy or len(runs.read_text()) == 2  # ADD, and its DEL
    plugin("STATUS", conf).error(spec.INVALID_NETWORK_CONFIG)
    plugin("DEL", conf, netns=pod).ok()
    plugin("GC", conf | {"cni.dev/valid-attachments": []}).ok()
    baseline.holds()


def test_the_policy_lists_the_delegates(
    plugin: Plugin, handle: Callable[..., Answer], ipam: FakeIpam, pod: Netns, baseline: Baseline
) -> None:
    """A delegate that is not listed is not run, by no command, except for an attachment that was added with it."""
    rules = "allowUnlisted: true\nipamTypes: [host-local]\n"
    gc = CONF | {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "net1"}]}
    plugin.policy.write_text(rules)
    error = handle("ADD", CONF, netns=pod).error(spec.INVALID_NETWORK_CONFIG)
    assert error["msg"] == 'ipam.type: "fake" is refused: ipamTypes of the policy are: host-local'
    handle("STATUS", CONF).error(spec.PLUGIN_NOT_AVAILABLE)
    handle("DEL", CONF, netns=pod).ok()
    handle("GC", gc).ok()
    plugin.policy.write_text("interfaces: 7")
    handle("DEL", CONF, netns=pod).ok()
    assert ipam.commands() == []
    plugin.policy.write_text(rules.replace("host-local", "fake"))
    result = handle("ADD", CONF, netns=pod).ok()
    plugin.policy.write_text(rules)
    handle("CHECK", CONF | {"prevResult": result}, netns=pod).ok()
    handle("GC", gc).ok()
    handle("DEL", CONF, netns=pod).ok()
    assert ipam.commands() == ["ADD", "CHECK", "DEL"]
    handle("DEL", CONF, netns=pod).ok()
    assert ipam.commands() == ["ADD", "CHECK", "DEL"]
    baseline.holds()


def test_a_delegate_that_cannot_delete(
    handle: Callable[..., Answer], ipam: FakeIpam, pod: Netns, baseline: Baseline
) -> None:
    """Our part is done all the same, its error is reported, and DEL may be repeated until it can."""
    handle("ADD", CONF, netns=pod).ok()
    ipam.write(DEL="""release; echo '{"code": 100, "msg": "the leases are locked"}'; exit 1""")
    for _ in range(2):
        assert "the leases are locked" in handle("DEL", CONF, netns=pod).error(100)["msg"]
        assert "net1" not in pod.links()
    ipam.write()
    handle("DEL", CONF, netns=pod).ok()
    baseline.holds()


def test_a_delegate_that_is_gone(
    handle: Callable[..., Answer], ipam: FakeIpam, pod: Netns, baseline: Baseline
) -> None:
    handle("ADD", CONF, netns=pod).ok()
    program = ipam.folder / "fake"
    away = program.rename(ipam.folder / "away")
    handle("DEL", CONF, netns=pod).error(spec.INVALID_NETWORK_CONFIG)
    assert "net1" not in pod.links()
    away.rename(program)
    handle("DEL", CONF, netns=pod).ok()
    baseline.holds()


def test_a_delegate_that_was_never_there(
    handle: Callable[..., Answer], ipam: FakeIpam, pod: Netns, baseline: Baseline
) -> None:
    """ADD is refused, and its DEL must not keep the pod in Terminating; nor one whose config got it since ADD."""
    conf = config(source=NIC, ipam={"type": "nowhere"})
    handle("ADD", conf, netns=pod).error(spec.INVALID_NETWORK_CONFIG)
    handle("DEL", conf, netns=pod).ok()
    handle("ADD", config(source=NIC), netns=pod).ok()
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize("now", ["other", "nowhere", "", "fake"])
def test_the_ipam_of_the_config_is_another_now(
    handle: Callable[..., Answer], ipam: FakeIpam, pod: Netns, baseline: Baseline, now: str
) -> None:
    """DEL is for the plugin that leased the address, with the ipam that it leased it by. now: its type; "": none."""
    (ipam.folder / "other").write_text('#!/bin/sh\nexec touch "$0.ran"\n')
    (ipam.folder / "other").chmod(0o755)
    section = ipam.config | {"range": "10.9.0.0/24"}
    handle("ADD", config(source=NIC, ipam=section), netns=pod).ok()
    handle("DEL", config(source=NIC, **({"ipam": {"type": now}} if now else {})), netns=pod).ok()
    assert ipam.commands() == ["ADD", "DEL"]
    assert json.loads(ipam.stdin("DEL"))["ipam"] == section
    assert not (ipam.folder / "other.ran").exists()
    baseline.holds()


@pytest.mark.parametrize("previous", ["x", 3, [], {"interfaces": "x"}, {"ips": [{"address": "x"}]}])
def test_a_malformed_prev_result(
    handle: Callable[..., Answer], ipam: FakeIpam, pod: Netns, baseline: Baseline, previous: object
) -> None:
    conf = CONF | {"prevResult": previous}
    for command in ("ADD", "CHECK"):
        answer = handle(command, conf, netns=pod)
        assert answer.error(answer.document["code"])["code"] in (6, 7)
    baseline.holds()
    handle("ADD", CONF, netns=pod).ok()
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()
