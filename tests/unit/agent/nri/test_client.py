"""The NRI plugin against a runtime that is well, slow, hostile, or gone."""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.agent.nri import nri_pb2 as api
from cni.agent.nri.client import Client, Pod
from cni.agent.nri.connection import MOST, PLUGIN, RUNTIME, Connection, ProtocolError
from cni.config.claim import NETWORKS
from cni.errors import CniError
from tests.unit.agent.nri.runtime import HEADER, Plugin, Runtime
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SANDBOX = api.PodSandbox(
    id="s1",
    name="vm",
    uid="u1",
    namespace="vms",
    pid=7,
    annotations={NETWORKS: "[]", "another": "x"},
    linux=api.LinuxPodSandbox(
        namespaces=[
            api.LinuxNamespace(type="ipc"),
            api.LinuxNamespace(type="network", path="/run/netns/a"),
        ]
    ),
)
POD = Pod("s1", "vms", "vm", "u1", "/run/netns/a", 7, "[]")
RUN = api.StateChangeEvent(event=api.RUN_POD_SANDBOX, pod=SANDBOX)
STOP = api.StateChangeEvent(event=api.STOP_POD_SANDBOX, pod=SANDBOX)


class Calls:
    """A handler that notes its calls, and does in each what a test sets."""

    def __init__(self) -> None:
        self.seen: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.act: Callable[[], None] = lambda: None

    def run(self, pod: Pod) -> None:
        self.seen.put(("run", pod))
        self.act()

    def stop(self, pod: Pod) -> None:
        self.seen.put(("stop", pod))
        self.act()

    def synchronize(self, pods: list[Pod]) -> None:
        self.seen.put(("synchronize", pods))
        self.act()

    def next(self) -> tuple[str, Any]:
        return self.seen.get(timeout=LIMIT)


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nri.sock"


@pytest.fixture
def client(path: Path, calls: Calls) -> Iterator[Client]:
    made = Client(str(path), calls)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def runtime(path: Path, client: Client) -> Iterator[Runtime]:
    with Runtime(path) as made:
        yield made


@pytest.fixture
def plugin(runtime: Runtime, calls: Calls) -> Iterator[Plugin]:
    """Connected and synchronized."""
    with runtime.accept() as made:
        assert made.connected() == 0b11
        assert calls.next() == ("synchronize", [])
        yield made


def test_it_registers_and_is_told_of_pods(runtime: Runtime, client: Client, calls: Calls) -> None:
    with runtime.accept() as plugin:
        request = plugin.registered()
        assert (request.plugin_name, request.plugin_idx) == ("vmtap", "10")
        assert not client.connected
        plugin.call("Configure", api.ConfigureRequest(request_timeout=60_000))
        plugin.call("Synchronize", api.SynchronizeRequest(pods=[SANDBOX]))
        assert client.connected
        assert calls.next() == ("synchronize", [POD])
        assert not plugin.call("StateChange", RUN).status.code
        assert not plugin.call("StateChange", STOP).status.code
        assert [calls.next(), calls.next()] == [("run", POD), ("stop", POD)]
        assert not plugin.call("Shutdown", api.Empty()).status.code
    until(lambda: not client.connected, "it does not see that the runtime is gone")


def test_a_list_of_sandboxes_in_parts(runtime: Runtime, client: Client, calls: Calls) -> None:
    with runtime.accept() as plugin:
        plugin.registered()
        plugin.call("Configure", api.ConfigureRequest())
        for more in (True, True, False):
            answer = plugin.call("Synchronize", api.SynchronizeRequest(pods=[SANDBOX] * 1000, more=more))
            assert api.SynchronizeResponse.FromString(answer.payload).more == more
        assert calls.next() == ("synchronize", [POD] * 3000)


@pytest.mark.parametrize("error", [CniError(11, "mode: not allowed"), ValueError("x"), KeyError("y")])
def test_an_event_that_fails_fails_its_sandbox_and_no_other(
    plugin: Plugin, calls: Calls, error: Exception
) -> None:
    def fail() -> None:
        raise error

    calls.act = fail
    status = plugin.call("StateChange", RUN).status
    assert status.code
    if isinstance(error, CniError):
        assert status.message == "vmtap: mode: not allowed"
    assert plugin.call("StateChange", STOP).status.code
    calls.act = lambda: None
    assert not plugin.call("StateChange", RUN).status.code


def test_an_exception_in_synchronize_does_not_end_the_connection(runtime: Runtime, calls: Calls) -> None:
    def fail() -> None:
        raise RuntimeError("a dead sandbox")

    calls.act = fail
    with runtime.accept() as plugin:
        plugin.connected([SANDBOX])
        calls.next()
        calls.act = lambda: None
        assert not plugin.call("StateChange", RUN).status.code
        assert calls.next() == ("run", POD)


def test_an_event_that_takes_long_is_answered_in_time(runtime: Runtime, calls: Calls) -> None:
    over, done = threading.Event(), threading.Event()

    def wait() -> None:
        over.wait(LIMIT)
        done.set()

    with runtime.accept() as plugin:
        plugin.connected(wait=400)
        calls.next()
        calls.act = wait
        assert not plugin.call("StateChange", RUN).status.code
        assert not done.is_set()
        calls.act = lambda: None
        assert not plugin.call("StateChange", STOP).status.code
        over.set()
        assert done.wait(LIMIT)


def test_more_events_than_can_be_worked_on_are_answered(plugin: Plugin, calls: Calls) -> None:
    over = threading.Event()

    def wait() -> None:
        over.wait(LIMIT)

    calls.act = wait
    plugin.call("Configure", api.ConfigureRequest(request_timeout=1))
    for _ in range(70):
        assert not plugin.call("StateChange", RUN).status.code
    over.set()


@pytest.mark.parametrize(
    ("method", "service"),
    [("UpdatePodSandbox", "nri.pkg.api.v1alpha1.Plugin"), ("Configure", "other"), ("", "")],
)
def test_a_call_that_it_does_not_have(plugin: Plugin, method: str, service: str) -> None:
    assert plugin.call(method, api.Empty(), service).status.code == 12
    assert not plugin.call("StateChange", RUN).status.code


@pytest.mark.parametrize("method", ["Configure", "Synchronize", "StateChange"])
def test_a_call_that_cannot_be_read(plugin: Plugin, method: str) -> None:
    assert plugin.call(method, b"\xff\xff\xff").status.code == 13
    assert not plugin.call("StateChange", RUN).status.code


def test_an_event_of_no_interest(plugin: Plugin, calls: Calls) -> None:
    for number in (0, 3, 99):
        event = api.StateChangeEvent(pod=SANDBOX)
        event.event = number  # type: ignore[assignment]
        assert not plugin.call("StateChange", event).status.code
    assert calls.seen.empty()


def test_a_runtime_that_restarts_synchronizes_again(
    path: Path, client: Client, plugin: Plugin, runtime: Runtime, calls: Calls
) -> None:
    runtime.close()
    plugin.close()
    until(lambda: not client.connected, "it does not see that the runtime is gone")
    with Runtime(path) as second, second.accept() as again:
        again.connected([SANDBOX])
        assert calls.next() == ("synchronize", [POD])
        assert client.connected


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\1" + b"\xff" * 4,
        b"\0\0\0\1" + (MOST + 11).to_bytes(4),
        b"\0\0\0\1" + (10).to_bytes(4) + HEADER.pack(MOST + 1, 1, 1, 0),
        b"\0\0\0\2" + (10).to_bytes(4) + HEADER.pack(0xFFFFFFFF, 1, 2, 0),
    ],
    ids=["a huge frame", "a large frame", "a large message", "a huge message"],
)
def test_what_is_no_frame_ends_the_connection_and_costs_no_memory(
    runtime: Runtime, plugin: Plugin, data: bytes
) -> None:
    plugin.socket.sendall(data)
    assert plugin.ended()
    with runtime.accept() as again:
        again.connected()


def test_other_channels_are_passed_over(plugin: Plugin) -> None:
    plugin.frame(0, b"x" * 100)
    plugin.frame(99, b"")
    plugin.frame(PLUGIN, b"")
    assert not plugin.call("StateChange", RUN).status.code


def test_a_message_in_frames_of_one_byte(plugin: Plugin, calls: Calls) -> None:
    payload = api.Request(
        service="nri.pkg.api.v1alpha1.Plugin", method="StateChange", payload=RUN.SerializeToString()
    ).SerializeToString()
    for byte in HEADER.pack(len(payload), 77, 1, 0) + payload:
        plugin.frame(PLUGIN, bytes([byte]))
    assert plugin.read(PLUGIN)[0] == 77
    assert calls.next() == ("run", POD)


def test_a_refused_registration_is_tried_again(runtime: Runtime) -> None:
    with runtime.accept() as plugin:
        plugin.registered("no plugin with this name")
        assert plugin.ended()
    with runtime.accept() as again:
        again.connected()


def test_a_runtime_that_never_answers_is_left(
    path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cni.agent.nri.client._REGISTRATION_SECONDS", 1.0)
    client = Client(str(path), calls)
    with Runtime(path) as runtime:
        client.start()
        with runtime.accept() as silent:
            assert silent.ended()
        with runtime.accept() as again:
            again.connected()
            until(lambda: client.connected, "it does not connect again")
            client.stop()


def test_stop_ends_a_client_without_a_runtime(path: Path, calls: Calls) -> None:
    client = Client(str(path), calls)
    client.start()
    client.stop()
    assert not client._thread.is_alive()


def test_stop_ends_a_connection(client: Client, plugin: Plugin) -> None:
    client.stop()
    assert plugin.ended()
    assert not client._thread.is_alive()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                lambda channel, length, stream, kind, rest: (
                    channel.to_bytes(4)
                    + (10 + len(rest)).to_bytes(4)
                    + HEADER.pack(length, stream, kind, 0)
                    + rest
                ),
                st.sampled_from([0, PLUGIN, RUNTIME]),
                st.integers(0, 60),
                st.integers(0, 9),
                st.integers(0, 3),
                st.binary(max_size=60),
            ),
        ),
        max_size=6,
    )
)
def test_any_bytes_are_messages_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("nri") / "nri.sock"
    with Runtime(path) as runtime, Connection(str(path)) as connection, runtime.accept() as plugin:
        before = len(os.listdir("/proc/self/fd"))
        plugin.socket.sendall(b"".join(data))
        plugin.close()
        total = 0
        with pytest.raises(ProtocolError):
            for message in connection.receive():
                total += len(message.data)
        assert total <= len(b"".join(data))
        assert len(os.listdir("/proc/self/fd")) <= before
