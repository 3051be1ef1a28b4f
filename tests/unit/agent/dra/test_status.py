"""status.py: what the claim's status says, sent until the API server takes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cni.agent.dra import status as module
from cni.agent.dra.status import Status
from tests.unit.agent.dra.standin import StandIn
from tests.unit.agent.dra.test_prepare import record
from tests.unit.state.test_claims import CLAIM, DEVICE, UID
from tests.waiting import until

PATCH = ("PATCH", "/apis/resource.k8s.io/v1/namespaces/vms/resourceclaims/vm-a-nic/status")


@pytest.fixture
def api() -> StandIn:
    made = StandIn()
    made.claims["vms/vm-a-nic"] = {}
    return made


def device(api: StandIn) -> dict[str, Any]:
    [found] = api.bodies[-1]["status"]["devices"]
    return dict(found)


def test_an_attached_device(api: StandIn) -> None:
    status = Status(api, lambda _: True)
    status.start()
    status.report(CLAIM, [record(CLAIM, DEVICE)])
    until(lambda: api.calls == [PATCH], "it was not reported")
    status.stop()
    status.join()
    assert api.bodies[0]["metadata"] == {"name": "vm-a-nic", "namespace": "vms", "uid": UID}
    found = device(api)
    assert (found["driver"], found["pool"], found["device"]) == ("vmtap.dev", "node1", "dataplane-0")
    assert found["networkData"] == {
        "interfaceName": "net1",
        "hardwareAddress": "02:00:00:00:00:01",
        "ips": ["10.1.0.5/24"],
    }
    [ready] = found["conditions"]
    assert (ready["type"], ready["status"]) == ("Ready", "True")
    assert "shareID" not in found


def test_the_same_is_reported_once(api: StandIn) -> None:
    """Each container of a pod causes a report; a remade sandbox has another one."""
    status = Status(api, lambda _: True)
    status.start()
    attached = record(CLAIM, DEVICE)
    for _ in range(2):
        status.report(CLAIM, [attached])
        until(lambda: not status._waiting, "it is not reported")
    status.report(CLAIM, [replace(attached, mac="02:00:00:00:00:02")])
    until(lambda: len(api.calls) == 2, "the change is not reported")
    status.report(replace(CLAIM, pod_uid="p2"), [attached])
    until(lambda: len(api.calls) == 3, "another pod's is not reported")
    status.stop()
    status.join()
    assert api.calls == [PATCH] * 3


def test_a_device_that_is_not_attached(api: StandIn) -> None:
    status = Status(api, lambda _: True)
    status.start()
    status.report(CLAIM, [])
    until(lambda: api.calls, "it was not reported")
    status.stop()
    status.join()
    assert device(api)["conditions"][0]["status"] == "False"
    assert "networkData" not in device(api)


def test_a_failure_is_tried_again(api: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SOONEST", 0.01)
    api.status = 403
    status = Status(api, lambda _: True)
    status.start()
    status.report(CLAIM, [])
    until(lambda: len(api.calls) >= 2, "it was not tried again")
    api.status = 200
    until(lambda: not status._waiting, "it is tried for ever")
    status.stop()
    status.join()


@pytest.mark.parametrize("gone", ["prepared", "api"])
def test_a_claim_that_is_gone_is_forgotten(api: StandIn, gone: str) -> None:
    api.claims.clear()
    status = Status(api, lambda _: gone == "api")
    status.report(CLAIM, [])
    status.start()
    until(lambda: not status._waiting, "it is tried for ever")
    status.stop()
    status.join()
    assert api.calls == ([PATCH] if gone == "api" else [])
