"""What the largest and densest input costs: work is counted, not timed. worst.py searched for these shapes."""

from __future__ import annotations

import gc
import json
import logging
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from cni import plugin as product
from cni.agent import log as logs
from cni.agent import wire
from cni.attach import result
from cni.attach.call import Request
from cni.config import netconf, nodefile, policy
from cni.errors import CniError
from tests.faults.worst import Case, Run, carry_out

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.runner import Plugin

MANY = 1 << 20
SHAPES = {
    "unknown keys": Run("u", "%s", "1", 15_000),
    "unknown keys with large values": Run("u", "%s", f'"{"x" * 4000}"', MANY),
    "lists": Run("args", "[%s]", "[]", MANY),
    "lists, fewer": Run("args", "[%s]", "[]", 16_000),
    "objects": Run("args", "[%s]", '{"":0}', 10_000),
    "deep": Run("args", "[%s]", "[" * 60 + "]" * 60, 500),
    "floats": Run("args", "[%s]", "1e-300", 32_000),
    "long integers": Run("args", "[%s]", "9" * 4300, MANY),
    "long strings": Run("name", "%s", f'"{"x" * 200_000}"', 1),
    "escapes": Run("u", "[%s]", '"\\u0001"', 32_000),
    "wrong items": Run("cni.dev/valid-attachments", "[%s]", "1", 32_000),
    "attachments": Run("cni.dev/valid-attachments", "[%s]", '{"containerID":"c%d","ifname":"net1"}', MANY),
    "wrong capabilities": Run("capabilities", "{%s}", '"c%d":1', 16_000),
    "addresses": Run("prevResult", '{"ips":[%s]}', '{"address":"10.1.2.3/8"}', 8_000),
    "most addresses": Run("prevResult", '{"ips":[%s]}', '{"address":"10.1.2.3/8"}', result.MOST),
    "routes": Run("prevResult", '{"routes":[%s]}', '{"dst":"10.0.0.0/8","gw":"10.0.0.1"}', 6_000),
    "most routes": Run("prevResult", '{"routes":[%s]}', '{"dst":"fd00::/8","gw":"fd00::1"}', result.MOST),
}


def calls(action: Callable[[], object]) -> int:
    """How many functions it calls, those of C included."""
    count = 0

    def called(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("command", ["ADD", "DEL", "GC"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_work_for_one_config(plugin: Plugin, command: str, shape: str) -> None:
    """At most twelve calls for each value that a config may have, whatever it is: about 20 ms."""
    stdin = Case(command, (SHAPES[shape],)).stdin()
    given = plugin.given()
    plugin.node.call(lambda: carry_out(command, stdin, given))  # imports
    assert plugin.node.call(lambda: calls(lambda: carry_out(command, stdin, given))) < 12 * (1 << 15)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_error_is_short(plugin: Plugin, shape: str) -> None:
    for command in ("ADD", "STATUS", "GC", "VERSION"):
        stdin = Case(command, (SHAPES[shape],)).stdin()
        request = Request(plugin.environment(command, "/nonexistent"), stdin)
        response = plugin.node.call(partial(product.handle, request, plugin.given()))
        assert len(response.stdout) < 20_000


def test_a_large_config_is_validated_outside_the_turn(plugin: Plugin) -> None:
    steps = mock.Mock()
    steps.decode.return_value = {}
    request = Request(
        plugin.environment("ADD", "/nonexistent"), Case("ADD", (SHAPES["unknown keys"],)).stdin()
    )
    with mock.patch.object(netconf, "decode", steps.decode):
        product.handle(request, plugin.given(), yield_turn=steps.leave)
    assert [name for name, *_ in steps.mock_calls] == ["leave", "decode"]


@pytest.mark.parametrize("stdin", [b"{", b'{"name": "n", "unknown": 1}', b'{"name": "n", "source": "eth9"}'])
def test_nothing_of_a_refused_request_is_kept(plugin: Plugin, stdin: bytes) -> None:
    """Not even until the next garbage collection: a request may have megabytes."""
    kept: list[weakref.ref[Request]] = []

    def answer() -> None:
        request = Request(plugin.environment("STATUS", None), stdin)
        kept.append(weakref.ref(request))
        response = product.handle(request, plugin.given())
        assert response.error

    gc.disable()
    try:
        plugin.node.call(answer)
    finally:
        gc.enable()
    assert kept[0]() is None


def test_few_strangers_are_compared() -> None:
    stdin = Case("ADD", (SHAPES["unknown keys"],)).stdin()
    with mock.patch("difflib.get_close_matches", return_value=[]) as compared:
        with pytest.raises(CniError):
            netconf.parse(stdin)
        with pytest.raises(CniError):
            netconf.parse(json.dumps({"name": "n", "type": "vmtap", "x" * 100_000: 1}).encode())
    assert compared.call_count == 4


@pytest.mark.parametrize(
    "variable", ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"]
)
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_a_long_variable(plugin: Plugin, variable: str, command: str) -> None:
    """The answer and the log line are short; a DEL goes on without CNI_ARGS."""
    config = json.dumps({"cniVersion": "1.1.0", "name": "n", "type": "vmtap", "source": "eth1"}).encode()
    for text in ("\0" * 100_000, "a/" * 60_000, "k=v;" * 30_000, ":" * 100_000):
        request = Request(plugin.environment(command, "/nonexistent") | {variable: text}, config)
        response = plugin.node.call(partial(product.handle, request, plugin.given()))
        assert len(response.stdout) < 20_000
        assert response.error or command == "DEL"


def test_a_log_line_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logs.LOG, "propagate", logs.LOG.propagate)
    before = logs.LOG.handlers, logs.LOG.level
    with (tmp_path / "log").open("w+") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        logs.start("info")
        try:
            logs.log(logging.INFO, "request", container="c" * 1_000_000, names=["n"] * 100_000, ms=1.5)
            for handler in logs.LOG.handlers:
                handler.close()
        finally:
            logs.LOG.handlers, logs.LOG.level = before
        stream.seek(0)
        # Threads of other tests may log, too.
        (text,) = [text for text in stream.read().splitlines() if json.loads(text)["msg"] == "request"]
    assert len(text) < 4000
    line: dict[str, Any] = json.loads(text)
    assert (line["ms"], len(line["container"]), line["names"][:4]) == (1.5, 1000, '["n"')


def test_an_environment_of_many_variables() -> None:
    env = b"".join(b"%d=\0" % number for number in range(10_000))
    with pytest.raises(wire.WireError, match="more than 8192 variables"):
        wire.parse(wire._HEAD.pack(wire._MAGIC, 0, len(env), 0) + env)


def test_a_policy_of_many_values(tmp_path: Path) -> None:
    """It is refused before anything is made of it."""
    file = tmp_path / "interfaces.yaml"
    for text in ("[" + "[]," * 100_000 + "]", "- a\n" * 100_000, "a: b\n" * 100_000):
        file.write_text(text)
        with mock.patch.object(nodefile, "_inspect") as inspected:
            with pytest.raises(CniError, match="too many values"):
                policy.load(file)
            inspected.assert_not_called()


def test_a_policy_of_thousands_of_interfaces(tmp_path: Path) -> None:
    file = tmp_path / "interfaces.yaml"
    file.write_text("interfaces:\n" + "".join(f"- {{name: n{i}, source: {{dev: e}}}}\n" for i in range(3000)))
    rules = policy.load(file)
    wanted = netconf.parse(b'{"name": "a", "type": "vmtap", "interface": "unknown"}')
    with pytest.raises(CniError) as caught:
        policy.authorize(rules, wanted)
    assert "and 2992 more" in caught.value.msg
