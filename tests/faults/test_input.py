"""Garbage on stdin, in the environment and in the policy: an error of the right code, and nothing is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni import spec
from lab.wire import NIC
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Netns
    from tests.faults.baseline import Baseline
    from tests.runner import Answer, Plugin

GOOD = json.dumps(config(source=NIC))
HEAD = GOOD[:-1]
GARBAGE: dict[str, tuple[bytes, set[int]]] = {
    "empty": (b"", {6}),
    "white space": (b" \n", {6}),
    "truncated": (GOOD[:40].encode(), {6}),
    "two documents": ((GOOD + GOOD).encode(), {6}),
    "not UTF-8": (GOOD.replace("wire", "wi\udcffre").encode(errors="surrogateescape"), {6}),
    "UTF-16": (GOOD.encode("utf-16"), {6}),
    "UTF-32": (GOOD.encode("utf-32"), {6}),
    "BOM": (b"\xef\xbb\xbf" + GOOD.encode(), {6}),
    "NUL": (GOOD.encode() + b"\0", {6}),
    "a list": (f"[{GOOD}]".encode(), {6}),
    "null": (b"null", {6}),
    "a number": (b"1", {6}),
    "duplicate keys": (f'{HEAD},"source":"eth2"}}'.encode(), {6, 7}),
    "duplicate keys deep down": (f'{HEAD},"ipam":{{"type":"a","type":"b"}}}}'.encode(), {6, 7}),
    "NaN": (f'{HEAD},"mtu":NaN}}'.encode(), {6, 7}),
    "Infinity": (f'{HEAD},"mtu":-Infinity}}'.encode(), {6, 7}),
    "1e999": (f'{HEAD},"mtu":1e999}}'.encode(), {6, 7}),
    "a lone surrogate": (f'{HEAD},"mac":"\\ud800"}}'.encode(), {6, 7}),
    "a lone surrogate as a key": (f'{HEAD},"\\udc80":1}}'.encode(), {6, 7}),
    "a NUL in a string": (f'{HEAD},"dns":{{"domain":"a\\u0000b"}}}}'.encode(), {6, 7}),
    "100k levels of list": (f'{HEAD},"args":{"[" * 100_000}'.encode(), {6, 7}),
    "100k levels of object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, {6, 7}),
    "65 levels": (f'{HEAD},"args":{"[" * 65}{"]" * 65}}}'.encode(), {6, 7}),
    "an integer of 5000 digits": (f'{HEAD},"mtu":{"9" * 5000}}}'.encode(), {6, 7}),
    "a mtu of 70000": (f'{HEAD},"mtu":70000}}'.encode(), {7}),
    "a bool for a number": (f'{HEAD},"mtu":true}}'.encode(), {7}),
    "no name": (GOOD.replace('"name": "wire", ', "").encode(), {7}),
    "a name with a newline": (GOOD.replace("wire", "wire\\n").encode(), {7}),
    "a name with a slash": (GOOD.replace("wire", "../wire").encode(), {7}),
    "an unknown version": (GOOD.replace("1.1.0", "9.9.9").encode(), {1}),
    "a version that is no string": (GOOD.replace('"1.1.0"', "1").encode(), {1, 6}),
    "an unknown key": (f'{HEAD},"mtuu":1500}}'.encode(), {2}),
    "a path in ipam.type": (f'{HEAD},"ipam":{{"type":"../../bin/sh"}}}}'.encode(), {7}),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_on_stdin(plugin: Plugin, pod: Netns, baseline: Baseline, name: str) -> None:
    stdin, codes = GARBAGE[name]
    answer = plugin("ADD", stdin, netns=pod)
    assert answer.stdout.count(b"\n") == 1
    assert answer.error(answer.document["code"])["code"] in codes
    baseline.holds()
    assert not plugin.state.exists()  # it was not even prepared


@pytest.mark.parametrize("name", [name for name in GARBAGE if "level" in name or "UTF" in name])
@pytest.mark.parametrize("command", ["VERSION", "DEL", "CHECK", "GC", "STATUS"])
def test_garbage_with_other_commands(
    *, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, name: str, command: str
) -> None:
    answer = handle(command, GARBAGE[name][0], netns=pod)
    if command == "VERSION":
        answer.ok()  # it survives any stdin
    elif answer.status:
        assert answer.document["code"] in (6, 7)
    baseline.holds()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CNI_IFNAME", "net%d"),  # to the kernel a pattern: it would make net0
        ("CNI_IFNAME", "net\udcff"),
        ("CNI_IFNAME", "a" * 16),
        ("CNI_IFNAME", "äääääääää"),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "a:b"),
        ("CNI_IFNAME", "a b"),
        ("CNI_IFNAME", "a\n"),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", "a\x1b[31m"),  # the kernel takes these five
        ("CNI_IFNAME", "a\x7f"),
        ("CNI_IFNAME", "a\x9b2J"),
        ("CNI_IFNAME", "a\u202eb"),
        ("CNI_IFNAME", "a\u200bb"),
        ("CNI_IFNAME", "\u00e0"),  # 0xc3 0xa0, of which the second is a space to it
        ("CNI_CONTAINERID", "../c"),
        ("CNI_CONTAINERID", "c\n"),
        ("CNI_CONTAINERID", "\udcff"),
        ("CNI_CONTAINERID", ""),
        ("CNI_ARGS", "K8S_POD_NAME=\udcff"),
        ("CNI_ARGS", "K8S_POD_NAME=a\x1b[2Jb"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=a\nb"),
        ("CNI_ARGS", "="),
        ("CNI_ARGS", "MAC=zz"),
        ("CNI_COMMAND", "add"),
        ("CNI_COMMAND", ""),
        ("CNI_NETNS", ""),
    ],
)
def test_a_bad_environment(plugin: Plugin, pod: Netns, baseline: Baseline, variable: str, value: str) -> None:
    answer = plugin("ADD", config(source=NIC), netns=pod, env={variable: value})
    assert variable in answer.error(spec.INVALID_ENVIRONMENT)["msg"]
    baseline.holds()


def test_the_names_that_are_allowed(plugin: Plugin, handle: Callable[..., Answer], pod: Netns) -> None:
    for ifname in ("a" * 15, "äöü", "net.1-2_3@if4", "-"):
        handle("ADD", config(source=NIC), netns=pod, ifname=ifname).ok()
        assert ifname in pod.links()
        handle("DEL", config(source=NIC), netns=pod, ifname=ifname).ok()
        assert ifname not in pod.links()
    assert plugin.leftovers() == []


POLICY = "interfaces:\n- name: a\n  source: {dev: eth1}\n  type: ethernet\n"


@pytest.mark.parametrize(
    "fault", ["group may write", "all may write", "their folder", "symlink", "twice", "empty doc"]
)
def test_a_policy_that_cannot_be_trusted(
    *,
    handle: Callable[..., Answer],
    plugin: Plugin,
    pod: Netns,
    baseline: Baseline,
    fault: str,
    tmp_path: Path,
) -> None:
    """Nothing is granted: not even what it would allow."""
    policy = plugin.policy
    policy.write_text(POLICY)
    handle("STATUS", config(interface="a")).ok()
    match fault:
        case "group may write":
            policy.chmod(0o664)
        case "all may write":
            policy.chmod(0o646)
        case "their folder":
            policy.parent.chmod(0o777)
        case "symlink":
            elsewhere = tmp_path / "theirs"
            elsewhere.mkdir(mode=0o777)
            elsewhere.chmod(0o777)
            policy.rename(elsewhere / "policy.yaml")
            policy.symlink_to(elsewhere / "policy.yaml")
        case "twice":
            policy.write_text(POLICY + "interfaces: []\n")
        case "empty doc":
            policy.write_text("--- \n...\n---\n- 1\n")
    error = handle("ADD", config(interface="a"), netns=pod).error(spec.INVALID_NETWORK_CONFIG)
    assert str(policy) in error["msg"]
    handle("STATUS", config(interface="a")).error(spec.PLUGIN_NOT_AVAILABLE)
    handle("DEL", config(interface="a"), netns=pod).ok()
    baseline.holds()


def test_del_after_the_policy_went_bad(
    handle: Callable[..., Answer], plugin: Plugin, pod: Netns, baseline: Baseline
) -> None:
    plugin.policy.write_text(POLICY)
    handle("ADD", config(interface="a"), netns=pod).ok()
    plugin.policy.write_text("interfaces: 7")
    handle("DEL", config(interface="a"), netns=pod).ok()
    baseline.holds()


def test_a_state_folder_that_others_could_write_to(
    plugin: Plugin, handle: Callable[..., Answer], pod: Netns
) -> None:
    plugin.state.mkdir(mode=0o777)
    plugin.state.chmod(0o777)
    handle("ADD", config(source=NIC), netns=pod).ok()
    assert plugin.state.stat().st_mode & 0o777 == 0o700
    handle("DEL", config(source=NIC), netns=pod).ok()


@pytest.mark.parametrize("what", ["file", "symlink"])
def test_a_state_folder_that_is_none(
    *,
    plugin: Plugin,
    handle: Callable[..., Answer],
    pod: Netns,
    baseline: Baseline,
    what: str,
    tmp_path: Path,
) -> None:
    if what == "file":
        plugin.state.write_text("")
    else:
        (tmp_path / "elsewhere").mkdir()
        plugin.state.symlink_to(tmp_path / "elsewhere")
    handle("ADD", config(source=NIC), netns=pod).error(spec.IO_FAILURE)
    assert "net1" not in pod.links()
    handle("DEL", config(source=NIC), netns=pod)
    assert "net1" not in pod.links()
