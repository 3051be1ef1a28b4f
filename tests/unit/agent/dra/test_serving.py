"""serving.py: a kubelet finds the driver, learns both versions of its service, and gets an answer for each claim."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cni.agent.dra import registration_pb2 as registry  # sets what gRPC reads

# isort: split
import grpc

from cni.agent.dra import registration_pb2_grpc as registry_services
from cni.agent.dra import v1_pb2 as api
from cni.agent.dra import v1_pb2_grpc as v1
from cni.agent.dra import v1beta1_pb2_grpc as v1beta1
from cni.agent.dra.prepare import Prepared
from cni.agent.dra.serving import Sockets
from cni.agent.metrics import Registry
from cni.errors import CniError
from tests.waiting import LIMIT

OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.default_authority", "localhost"))


class Fake:
    """Claims called "bad" are refused, "broken" ones meet a fault."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def prepare(self, namespace: str, name: str, uid: str) -> list[Prepared]:
        self._call("prepare", namespace, name, uid)
        return [Prepared("nic", "node", "data-0", f"vmtap.dev/claim={uid}-0")]

    def unprepare(self, uid: str) -> None:
        self._call("unprepare", uid)

    def _call(self, *words: str) -> None:
        self.calls.append(words)
        if "bad" in words:
            raise CniError(7, "parameters of the claim: mtuu: unknown key")
        if "broken" in words:
            raise RuntimeError("secret")


@pytest.fixture
def kubelet() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vmtap-"))  # a socket's path has 107 bytes at most
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def registered() -> list[str]:
    return []


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def sockets(kubelet: Path, fake: Fake, registered: list[str]) -> Iterator[Sockets]:
    calls = Registry().counter("x_total", "", "call", "result")
    made = Sockets(str(kubelet), fake, calls, registered.append)  # type: ignore[arg-type]
    yield made
    made.close()
    assert not [path for path in kubelet.rglob("*") if path.is_socket()]


def channel(path: str | Path) -> grpc.Channel:
    return grpc.insecure_channel(f"unix:{path}", options=OPTIONS)


def test_registration(sockets: Sockets, kubelet: Path, registered: list[str]) -> None:
    assert Path(sockets.path).parent == kubelet / "plugins_registry"
    with channel(sockets.path) as open_channel:
        stub = registry_services.RegistrationStub(open_channel)
        info = stub.GetInfo(registry.InfoRequest(), timeout=LIMIT)
        assert (info.type, info.name) == ("DRAPlugin", "vmtap.dev")
        assert list(info.supported_versions) == ["v1.DRAPlugin", "v1beta1.DRAPlugin"]
        assert Path(info.endpoint).is_socket()
        stub.NotifyRegistrationStatus(registry.RegistrationStatus(error="no"), timeout=LIMIT)
        stub.NotifyRegistrationStatus(registry.RegistrationStatus(plugin_registered=True), timeout=LIMIT)
        stub.NotifyRegistrationStatus(registry.RegistrationStatus(), timeout=LIMIT)
        assert registered == ["no", "", "it gives no reason"]


@pytest.mark.parametrize("version", [v1, v1beta1])
def test_both_versions(sockets: Sockets, kubelet: Path, fake: Fake, version: Any) -> None:
    [endpoint] = (kubelet / "plugins/vmtap.dev").iterdir()
    names = ("good", "bad", "broken")
    claims = [api.Claim(namespace="vms", name=name, uid=name) for name in names]
    with channel(endpoint) as open_channel:
        stub = version.DRAPluginStub(open_channel)
        answer = stub.NodePrepareResources(api.NodePrepareResourcesRequest(claims=claims), timeout=LIMIT)
        assert {uid: each.error for uid, each in answer.claims.items()} == {
            "good": "",
            "bad": "parameters of the claim: mtuu: unknown key",
            "broken": "a fault in vmtap itself: please report it",
        }
        [device] = answer.claims["good"].devices
        assert list(device.request_names) == ["nic"]
        assert (device.pool_name, device.device_name) == ("node", "data-0")
        assert list(device.cdi_device_ids) == ["vmtap.dev/claim=good-0"]
        undone = stub.NodeUnprepareResources(api.NodeUnprepareResourcesRequest(claims=claims), timeout=LIMIT)
        assert undone.claims.keys() == {*names}  # an entry for each, as the kubelet demands
        assert [uid for uid, each in undone.claims.items() if not each.error] == ["good"]
    assert fake.calls[0] == ("prepare", "vms", "good", "good")


def test_the_next_agent_removes_the_sockets_of_a_killed_one_only(
    sockets: Sockets, kubelet: Path, fake: Fake
) -> None:
    stale = kubelet / "plugins_registry/vmtap.dev-0-reg.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    other = kubelet / "plugins_registry/gpu.example.com-reg.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(other))
    calls = Registry().counter("y_total", "", "call", "result")
    second = Sockets(str(kubelet), fake, calls, lambda _: None)  # type: ignore[arg-type]
    assert not stale.exists()
    assert other.exists()
    assert sockets.there
    assert second.there
    second.close()
    assert sockets.there
    other.unlink()
