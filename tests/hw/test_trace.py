"""What vmtapctl trace concludes of VLANs and virtual functions, and what the frames do."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from cni.ctl import locations
from cni.ctl.trace import gather
from lab.frames import BROADCAST, Frame, collect, write_tap
from lab.process import run
from tests.netns.conftest import open_queues, records
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cni.ctl.trace.facts import Verdict
    from lab.hw import Root
    from lab.wire import Netns
    from tests.hw.nic import Nic
    from tests.runner import Plugin

BRIDGE = "brtrace"


@pytest.fixture
def bridge(node: Root) -> Iterator[str]:
    """A bridge with vlan_filtering and no port."""
    node.ip(f"link add {BRIDGE} up type bridge stp_state 0 forward_delay 0 mcast_snooping 0 vlan_filtering 1")
    yield BRIDGE
    node.ip(f"link delete {BRIDGE}")


def _compared(
    plugin: Plugin,
    pods: Callable[[], Netns],
    a: dict[str, Any],
    b: dict[str, Any],
    *commands: str,
) -> tuple[Verdict, tuple[bool, ...]]:
    """The verdict, and whether a's unicast and broadcast arrive at b, and b's at a. commands: of bridge(8)."""
    with ExitStack() as stack:
        fds, macs, names = {}, {}, {}
        for name, fields in (("a", a), ("b", b)):
            pod = pods()
            stack.callback(plugin, "DEL", config(**fields), netns=pod, container=name)
            plugin("ADD", config(**fields), netns=pod, container=name).ok()
            (record,) = records(plugin, pod)
            (fd,) = open_queues(pod, record)
            stack.callback(os.close, fd)
            fds[name], macs[name], names[name] = fd, record.mac, f"vth{record.ifindex:08x}"
            pod.wait_until_up("net1")
            if record.device == "tap":
                plugin.node.wait_until_up(names[name])
        for command in commands:
            run(["bridge", *command.format(**names).split()])
        # trace does not look at its own process, which is the tests' here.
        holder = subprocess.Popen(["sleep", "1000"], pass_fds=list(fds.values()))
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        found = locations.load(run=str(plugin.state), policy=str(plugin.policy), file=None)
        (verdict,) = gather.trace(found, "a/net1", "b/net1")
        for sender, receiver in (("a", "b"), ("b", "a")):
            write_tap(fds[sender], Frame(macs[receiver], macs[sender], f"{sender} unicast"))
            write_tap(fds[sender], Frame(BROADCAST, macs[sender], f"{sender} broadcast"))
        got = collect(fds, timeout=1.0)
    seen = {(name, frame.token) for name, frames in got.items() for frame in frames}
    wanted = [
        (receiver, f"{sender} {to}")
        for sender, receiver in (("a", "b"), ("b", "a"))
        for to in ("unicast", "broadcast")
    ]
    return verdict, tuple(each in seen for each in wanted)


@pytest.mark.parametrize(
    ("a", "b", "verdict", "why"),
    [
        ({"vlan": 100}, {"vlan": 100}, "can", "the macvlan driver on v"),
        (
            {"vlan": 100},
            {"vlan": 200},
            "cannot",
            "net1 of a is in VLAN 100, net1 of b is in VLAN 200 on the wire",
        ),
        ({"vlan": 100}, {}, "cannot", "is in VLAN 100, net1 of b is in VLAN none"),
        ({"vlan": 100, "mode": "vepa"}, {"vlan": 100, "mode": "vepa"}, "may", "was not probed"),
        ({"vlan": 100}, {"source": "pf0"}, "may", "net1 of a is on pf1 VLAN 100, net1 of b is on pf0"),
    ],
)
def test_vlans(
    node: Root,
    plugin: Plugin,
    pods: Callable[[], Netns],
    *,
    a: dict[str, Any],
    b: dict[str, Any],
    verdict: str,
    why: str,
) -> None:
    common = {"source": "pf1", "mode": "bridge"}
    found, arrived = _compared(plugin, pods, common | a, common | b)
    assert (found.verdict, why in found.summary) == (verdict, True), found.summary
    assert arrived == ((True,) * 4 if verdict == "can" else (False,) * 4)


@pytest.mark.parametrize(
    ("commands", "verdict", "why"),
    [
        ((), "can", f"by the bridge {BRIDGE}"),
        (
            ("vlan add dev {a} vid 7 pvid untagged", "vlan del dev {a} vid 1"),
            "cannot",
            "is in VLAN 7, net1 of b is in VLAN 1 on brtrace",
        ),
        (("vlan del dev {a} vid 1",), "cannot", "is in VLAN none, net1 of b is in VLAN 1"),
        (
            (
                "vlan add dev {a} vid 7 pvid untagged",
                "vlan del dev {a} vid 1",
                "vlan add dev {b} vid 7 pvid untagged",
                "vlan del dev {b} vid 1",
            ),
            "can",
            f"by the bridge {BRIDGE}",
        ),
    ],
)
def test_vlans_of_a_bridge(
    bridge: str,
    plugin: Plugin,
    pods: Callable[[], Netns],
    *,
    commands: tuple[str, ...],
    verdict: str,
    why: str,
) -> None:
    tap = {"source": bridge, "mode": "bridge"}
    found, arrived = _compared(plugin, pods, tap, tap, *commands)
    assert (found.verdict, why in found.summary) == (verdict, True), found.summary
    assert arrived == ((True,) * 4 if verdict == "can" else (False,) * 4)


def test_a_tap_and_a_macvtap_on_its_bridge(bridge: str, plugin: Plugin, pods: Callable[[], Netns]) -> None:
    macvtap = {"source": bridge, "device": "macvtap", "mode": "bridge"}
    tap = {"source": bridge, "mode": "bridge"}
    found, arrived = _compared(plugin, pods, tap, macvtap)
    assert (found.verdict, arrived) == ("can", (True,) * 4), found.summary
    other = ("vlan add dev {a} vid 7 pvid untagged", "vlan del dev {a} vid 1")
    found, arrived = _compared(plugin, pods, tap, macvtap, *other)
    assert (found.verdict, arrived) == ("cannot", (False,) * 4), found.summary
    assert "is in VLAN 7, net1 of b is in VLAN 1 on brtrace" in found.summary


@pytest.mark.parametrize(
    ("vlans", "verdict", "why"),
    [
        ((None, None), "can", "embedded switch of pf0"),
        ((100, 100), "can", "embedded switch of pf0"),
        ((100, 200), "cannot", "net1 of a is in VLAN 100, net1 of b is in VLAN 200 on pf0"),
    ],
)
def test_virtual_functions(
    bare: Nic,
    plugin: Plugin,
    pods: Callable[[], Netns],
    *,
    vlans: tuple[int | None, int | None],
    verdict: str,
    why: str,
) -> None:
    plugin.policy.write_text("interfaces: [{name: fast, source: {dev: pf0}, type: sr-iov, modes: [bridge]}]")
    bare.make_vfs(2)
    fast: dict[str, Any] = {"interface": "fast", "mode": "bridge"}
    a, b = (fast | ({"vlan": each} if each else {}) for each in vlans)
    found, arrived = _compared(plugin, pods, a, b)
    assert (found.verdict, why in found.summary) == (verdict, True), found.summary
    assert arrived == ((True,) * 4 if verdict == "can" else (False,) * 4)
