"""The stated property: any bytes on stdin, any environment.

At most one JSON document on stdout; a failure has exactly one error object, with a known code and no traceback;
nothing is asked of the kernel before all is valid; DEL never removes a link that is not ours.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cni import plugin as product
from cni import spec
from cni.attach.call import Request
from cni.config import netconf
from cni.errors import CniError
from cni.kernel import rtnl
from lab.wire import BRIDGE, NIC, Lab
from tests.faults.baseline import links
from tests.runner import Plugin, config
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator


CODES = {value for name, value in vars(spec).items() if name.isupper() and isinstance(value, int)}
COMMANDS = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"]
FOREIGN = ("net1", "net2", "other", "eth9")
"""Links of the fuzzed pod that are somebody's, under names that the fuzzer likes."""

words = st.text(st.characters(exclude_characters="\0"), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
known = sorted({*netconf._rules("vmtap")["properties"], "cniVersion", "type", "name"})
good = st.fixed_dictionaries(
    {
        "cniVersion": st.sampled_from(spec.VERSIONS),
        "name": st.sampled_from(["wire", "n"]),
        "type": st.just("vmtap"),
    },
    optional={
        "source": st.sampled_from([NIC, BRIDGE, "lo", "nothing"]),
        "device": st.sampled_from(["macvtap", "tap"]),
        "mode": st.sampled_from(["vepa", "pepa", "bridge", "private"]),
        "mac": st.sampled_from(["02:00:00:00:00:01", "", "x"]),
        "mtu": st.integers(0, 70000),
        "queues": st.integers(0, 300),
        "ipam": st.sampled_from([{}, {"type": "nothing"}, {"type": "../x"}]),
        "prevResult": json_values,
        "cni.dev/valid-attachments": st.just([]) | json_values,
        "runtimeConfig": json_values,
    },
)
documents = (
    good
    | st.builds(lambda base, more: {**base, **more}, good, st.dictionaries(words, json_values, max_size=2))
    | st.builds(lambda base, key, value: {**base, key: value}, good, st.sampled_from(known), json_values)
    | json_values
)
encoded = documents.map(lambda document: json.dumps(document).encode())
stdins = (
    encoded
    | st.binary(max_size=64)
    | st.builds(lambda data, at: data[: at % (len(data) + 1)], encoded, st.integers(0, 1 << 16))
    | st.builds(
        lambda data, at, byte: data[:at] + byte + data[at:],
        encoded,
        st.integers(0, 200),
        st.binary(max_size=2),
    )
)


def environments(paths: list[str]) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries(
        {"CNI_COMMAND": st.sampled_from(COMMANDS) | words},
        optional={
            "CNI_CONTAINERID": st.sampled_from(["c1", "c2"]) | words,
            "CNI_IFNAME": st.sampled_from([*FOREIGN, "net0"]) | words,
            "CNI_NETNS": st.sampled_from(paths) | words,
            "CNI_ARGS": st.sampled_from(["", "MAC=02:00:00:00:00:09", "IgnoreUnknown=1;X=1"]) | words,
            "CNI_PATH": st.sampled_from(["/nonexistent", ""]) | words,
        },
    )


class World:
    """One lab for all examples of a test: a pod with links of ours and of others."""

    def __init__(self, lab: Lab, plugin: Plugin) -> None:
        self.plugin = plugin
        self.pod = lab.pod()
        self.pod.ip(*(f"link add {name} type veth peer name {name}-peer" for name in FOREIGN))
        self.node = lab.node
        self.before = self.now()

    def now(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The links that are not ours: those that have no mark."""
        theirs = {name: link for name, link in links(self.pod).items() if not link["ifalias"]}
        outside = {name: link for name, link in links(self.node).items() if not link["ifalias"]}
        for link in outside.values():
            link.pop("promiscuity")  # the lower device's rises with what ADD makes
            link.pop("allmulti")
        return theirs, outside

    def intact(self) -> None:
        assert self.now() == self.before

    def paths(self) -> list[str]:
        return [str(self.pod.path), str(self.node.path), "/proc/self/ns/net", "/nonexistent", "/dev/zero", ""]


@pytest.fixture
def world(lab: Lab, plugin: Plugin) -> World:
    return World(lab, plugin)


@contextmanager
def kernel_spied(asked: list[str]) -> Iterator[None]:
    """Notes each netlink socket that is opened, in order with the end of the config's validation."""
    opened, read = rtnl.Rtnl.__init__, netconf.read

    def open_(self: rtnl.Rtnl) -> None:
        asked.append("kernel")
        opened(self)

    def read_(*args: Any, **more: Any) -> netconf.NetConf:
        conf = read(*args, **more)
        asked.append("valid")
        return conf

    with mock.patch.object(rtnl.Rtnl, "__init__", open_), mock.patch.object(netconf, "read", read_):
        yield


def judge(stdout: bytes, status: int, command: str) -> None:
    """What every answer must be."""
    assert stdout.count(b"\n") <= 1
    document = json.loads(stdout) if stdout else None
    if status:
        assert isinstance(document, dict)
        assert document.keys() - {"details"} == {"cniVersion", "code", "msg"}
        assert document["code"] in CODES - {spec.INTERNAL}, document
        assert document["msg"]
        assert "\n" not in document["msg"]
        assert "Traceback" not in document["msg"] + document.get("details", "")
    elif command in ("ADD", "VERSION"):
        assert isinstance(document, dict)
        assert "code" not in document
    else:
        assert document is None


SETTINGS = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize=True,
    database=None,
)


def test_any_bytes_and_any_environment(world: World) -> None:
    @SETTINGS
    @given(stdin=stdins, env=environments(world.paths()))
    def holds(stdin: bytes, env: dict[str, str]) -> None:
        request = Request(env, stdin)
        asked: list[str] = []
        with kernel_spied(asked):
            response = world.node.call(lambda: product.handle(request, world.plugin.given()))
        command = env["CNI_COMMAND"]
        event(f"{command if command in COMMANDS else 'other'} {response.status}")
        judge(response.stdout, response.status, command)
        if response.error:
            assert isinstance(response.error, CniError)
        if "kernel" in asked:
            assert asked[0] == "valid"
        if command == "ADD" and response.status == 0:
            cleaned = Request({**env, "CNI_COMMAND": "DEL"}, stdin)
            assert world.node.call(lambda: product.handle(cleaned, world.plugin.given())).status == 0

    holds()
    world.intact()
    assert world.plugin.leftovers() == []


def test_del_and_gc_of_anything(world: World) -> None:
    """With foreign links under the very names, and stale records about."""

    @SETTINGS
    @given(
        ifname=st.sampled_from(FOREIGN),
        container=st.sampled_from(["c1", "c2"]),
        document=good,
        command=st.sampled_from(["DEL", "GC"]),
        netns=st.sampled_from(world.paths()),
    )
    def holds(ifname: str, container: str, document: dict[str, Any], command: str, netns: str) -> None:
        request = Request(
            env={
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": container,
                "CNI_IFNAME": ifname,
                "CNI_NETNS": netns,
                "CNI_PATH": "/nonexistent",
            },
            stdin=json.dumps(document).encode(),
        )
        response = world.node.call(lambda: product.handle(request, world.plugin.given()))
        judge(response.stdout, response.status, command)

    holds()
    world.intact()


ODD: dict[str, tuple[bytes | None, dict[str, str]]] = {
    "UTF-16": (b"\xff\xfe", {}),
    "deep": (b"[" * 100_000, {}),
    "command": (b"{}", {"CNI_COMMAND": "\udcff"}),
    "version": (b"{}", {"CNI_COMMAND": "VERSION"}),
    "version of nothing": (b"", {"CNI_COMMAND": "VERSION", "CNI_ARGS": "\udcff"}),
    "netns": (None, {"CNI_NETNS": "\udcff"}),
    "long netns": (None, {"CNI_NETNS": "x" * 5000}),
    "long id": (None, {"CNI_CONTAINERID": "c" * 100_000}),
    "long args": (None, {"CNI_ARGS": "K8S_POD_NAME=" + "p" * 100_000}),
    "impossible state": (None, {"VMTAP_RUN": "/proc/self/nothing"}),
    "policy is a folder": (None, {"VMTAP_POLICY": "/"}),
    "policy is a device": (None, {"VMTAP_POLICY": "/dev/zero"}),
    "no UTF-8 mode": (None, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "poor": (None, {"PATH": "", "HOME": "", "LANG": "xx_XX.nonsense"}),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_the_executable(world: World, command: str, odd: str) -> None:
    """The same of a process: its streams and its status."""
    stdin, env = ODD[odd]
    if stdin is None:
        stdin = json.dumps(config(source=NIC)).encode()
    variables = {**world.plugin.environment(command, world.pod, ifname="net0"), **env}
    nsenter, *rest = world.plugin.argv()
    argv = [shutil.which(nsenter) or nsenter, *rest]
    done = subprocess.run(argv, input=stdin, env=variables, capture_output=True, timeout=LIMIT, check=False)
    judge(done.stdout, done.returncode, variables["CNI_COMMAND"])
    assert b"Traceback" not in done.stderr
    cleaned = {**variables, "CNI_COMMAND": "DEL", "CNI_NETNS": str(world.pod.path)}
    subprocess.run(argv, input=stdin, env=cleaned, capture_output=True, check=False)
    world.intact()
