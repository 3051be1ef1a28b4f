"""No config holds a pod in Terminating: DEL succeeds, and the attachment of its container id and ifname is gone."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from cni.config import netconf
from cni.errors import CniError
from lab.wire import NIC
from tests.faults.test_fuzz import json_values, known, stdins
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Netns
    from tests.fakeipam import FakeIpam
    from tests.runner import Answer, Plugin

CONFIG = config(source=NIC, ipam={"type": "fake"})
STRICT = (
    """python3 -c 'import json; assert json.load(open("DEL.stdin"))["ipam"] == {"type": "fake"}' && release"""
)
"""For the delegate's DEL: it fails if its config is not the one of ADD."""
HEAD = json.dumps(CONFIG)[:-1]
NAMES: tuple[Any, ...] = (None, "", "a/b", "../..", "a\n", ".", 1, ["wire"], {})
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "key twice": f'{HEAD},"source":"{NIC}"}}'.encode(),
    "name twice": f'{HEAD},"name":"other"}}'.encode(),
    "NUL": f'{HEAD},"mode":"a\\u0000"}}'.encode(),
    "NUL in an unknown key": f'{HEAD},"\\u0000":1}}'.encode(),
    "half a surrogate": f'{HEAD},"args":["\\ud800"]}}'.encode(),
    "not UTF-8": f'{HEAD},"mac":"'.encode() + b'\xff"}',
    "BOM": b"\xef\xbb\xbf" + json.dumps(CONFIG).encode(),
    "deep": f'{HEAD},"args":{"[" * 100}{"]" * 100}}}'.encode(),
    "too large": json.dumps(CONFIG).encode().ljust((1 << 20) + 1),
    "too many values": f'{HEAD},"args":[{"1," * (1 << 15)}1]}}'.encode(),
    **{f"name {name!r}": json.dumps(CONFIG | {"name": name}).encode() for name in NAMES},
    "no name": json.dumps({key: value for key, value in CONFIG.items() if key != "name"}).encode(),
    **{
        f"version {version!r}": json.dumps(CONFIG | {"cniVersion": version}).encode()
        for version in ("9.9.9", "", None, 1, ["1.1.0"], "0.1.0", "0.3.0")
    },
    **{
        f"ipam {ipam!r}": json.dumps(CONFIG | {"ipam": ipam}).encode()
        for ipam in (None, {}, {"type": "../x"}, {"type": "no-such"}, {"type": "fake", "ranges": "x"}, 5)
    },
    "prevResult": json.dumps(CONFIG | {"prevResult": {"interfaces": 5}}).encode(),
}


@pytest.mark.parametrize("recorded", [True, False], ids=["", "without a record"])
@pytest.mark.parametrize("name", HOSTILE)
def test_each(
    *, handle: Callable[..., Answer], plugin: Plugin, pod: Netns, ipam: FakeIpam, name: str, recorded: bool
) -> None:
    ipam.write(DEL=STRICT)
    handle("ADD", CONFIG, netns=pod).ok()
    if not recorded:
        for path in plugin.leftovers():
            os.unlink(path)
    answer = handle("DEL", HOSTILE[name], netns=pod)
    assert (answer.status, answer.stdout) == (0, b"")
    assert list(pod.links()) == ["lo"]
    assert plugin.leftovers() == []
    if recorded:
        assert list((ipam.seen / "leases").iterdir()) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_each_after_an_add_that_refused_it(
    handle: Callable[..., Answer], plugin: Plugin, pod: Netns, ipam: FakeIpam, name: str
) -> None:
    ipam.write(ADD="exit 1", DEL="exit 1")
    handle("ADD", HOSTILE[name], netns=pod)
    for _ in range(2):
        answer = handle("DEL", HOSTILE[name], netns=pod)
        assert (answer.status, answer.stdout) == (0, b"")
    assert list(pod.links()) == ["lo"]
    assert plugin.leftovers() == []


def test_other_attachments_stay(handle: Callable[..., Answer], pod: Netns) -> None:
    """A DEL without a network ends that of its container id and ifname only."""
    for container, ifname in (("c1", "net1"), ("c1", "net2"), ("c1-", "net3"), ("c1x", "net4")):
        handle("ADD", config(source=NIC), netns=pod, container=container, ifname=ifname).ok()
    handle("DEL", b"{", netns=pod, container="c1", ifname="net1").ok()
    handle("DEL", b"{", netns=pod, container="c1", ifname="net4").ok()
    assert set(pod.links()) == {"lo", "net2", "net3", "net4"}
    for container, ifname in (("c1", "net2"), ("c1-", "net3"), ("c1x", "net4")):
        handle("DEL", b"{", netns=pod, container=container, ifname=ifname).ok()
    assert list(pod.links()) == ["lo"]


@pytest.mark.parametrize(
    ("container", "ifname"),
    [("c1", "net%d"), ("c1", "a/b"), ("c1", "x" * 16), ("c1", "a\x7f"), ("../c1", "net1"), ("c1\n", "net1")],
)
def test_names_that_add_refuses(
    handle: Callable[..., Answer], plugin: Plugin, pod: Netns, container: str, ifname: str
) -> None:
    """A pod's author may choose the ifname (Multus)."""
    assert handle("ADD", config(source=NIC), netns=pod, container=container, ifname=ifname).error(4)
    handle("DEL", config(source=NIC), netns=pod, container=container, ifname=ifname).ok()
    assert plugin.leftovers() == []


def _network(stdin: bytes) -> str:
    """The network in which an ADD would look, if it is an acceptable one; else ""."""
    try:
        name = netconf.Document(stdin, "DEL").decoded().get("name")
        return netconf.parse(json.dumps({"name": name}).encode()).name
    except CniError:
        return ""


def test_anything(handle: Callable[..., Answer], plugin: Plugin, pod: Netns) -> None:
    conf: dict[str, Any] = config(source=NIC)
    changed = st.builds(
        lambda key, value: json.dumps({**conf, key: value}).encode(), st.sampled_from(known), json_values
    )

    @settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        derandomize=True,
        database=None,
    )
    @given(stdin=changed | stdins, args=st.text(max_size=20))
    @example(stdin=b'{"name":"wire","cniVersion":"7"}', args="MAC=\0")
    def holds(stdin: bytes, args: str) -> None:
        handle("ADD", conf, netns=pod).ok()
        answer = handle("DEL", stdin, netns=pod, args=args)
        assert (answer.status, answer.stdout) == (0, b"")
        network = _network(stdin)
        event("another network" if network not in ("", "wire") else network or "no network")
        if network not in ("", "wire"):  # then it names another attachment
            handle("DEL", conf, netns=pod).ok()
        assert list(pod.links()) == ["lo"]
        assert plugin.leftovers() == []

    holds()
