"""claim.py: what a claim's parameters may say, and which network config follows."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cni.config import claim as claims
from cni.config import policy, schema
from cni.errors import CniError
from cni.spec import INVALID_NETWORK_CONFIG, UNSUPPORTED_FIELD

POLICY = policy.of(
    "interfaces.yaml",
    {
        "interfaces": [
            {"name": "dataplane", "source": {"dev": "eth1"}, "capacity": 4},
            {"name": "Up_Link.1", "source": {"dev": "eth2"}},
        ]
    },
)


def result(request: str = "nic", device: str = "dataplane-0", **more: Any) -> dict[str, Any]:
    return {"request": request, "driver": claims.DRIVER, "pool": "node", "device": device, **more}


def config(
    parameters: object, *requests: str, of: str = "FromClaim", driver: str = claims.DRIVER
) -> dict[str, Any]:
    return {"source": of, "requests": list(requests), "opaque": {"driver": driver, "parameters": parameters}}


def claim(
    *results: dict[str, Any], configs: Any = (), reserved: Any = None, **metadata: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": "vm-a-nic-x7", "uid": "u1", **metadata},
        "status": {
            "allocation": {"devices": {"results": [*results], "config": [*configs]}},
            "reservedFor": [{"resource": "pods", "name": "vm-a", "uid": "p1"}]
            if reserved is None
            else reserved,
        },
    }


def only(document: dict[str, Any]) -> claims.Allocated:
    [found] = claims.allocated(document)
    return found


def refusal(document: dict[str, Any]) -> CniError:
    with pytest.raises(CniError) as refused:
        claims.allocated(document)
    return refused.value


def test_the_claim_wins_over_the_class_whatever_the_order() -> None:
    given = [
        config({"mtu": 9000, "mode": "vepa"}),
        config({"mode": "bridge", "queues": 2}, of="FromClass"),
        config({"mtu": 1400}, "other"),
        config({"mtu": 1}, driver="gpu.example.com"),
    ]
    assert only(claim(result(), configs=given)).fields == {"mode": "vepa", "queues": 2, "mtu": 9000}


def test_a_subrequest_has_the_parameters_of_its_request() -> None:
    given = [
        config({"mtu": 9000}, "nic"),
        config({"queues": 2}, "nic/fast"),
        config({"mtu": 1400}, "nic/slow"),
    ]
    found = only(claim(result("nic/fast"), configs=given))
    assert found.fields == {"mtu": 9000, "queues": 2}
    assert claims.network_config(found, POLICY.interfaces[0])["name"] == "claim-nic.fast"
    assert found.base == "nic"


def test_the_network_config_is_one_that_an_add_accepts() -> None:
    given = [
        config({"apiVersion": "vmtap.dev/v1alpha1", "kind": "NetworkConfig", "ifname": "net1", "vlan": 7})
    ]
    found = only(claim(result(), configs=given))
    assert found.ifname == "net1"
    document = claims.network_config(found, POLICY.interfaces[0])
    conf = claims.parse(document)
    assert (conf.interface, conf.device, conf.owner, conf.group) == ("dataplane", "macvtap", 107, 107)
    assert conf.vlan
    assert policy.authorize(POLICY, conf).source == "eth1"
    assert json.loads(json.dumps(document)) == document


def test_every_shared_field_is_one_of_the_network_config() -> None:
    assert {*claims.SHARED} < schema.load("netconf")["properties"].keys()


@pytest.mark.parametrize(
    ("parameters", "code", "words"),
    [
        ({"mtuu": 1500}, UNSUPPORTED_FIELD, "parameters of the claim: mtuu: unknown key"),
        ({"mtuu": 1500}, UNSUPPORTED_FIELD, 'did you mean "mtu"'),
        ({"mtu": "1500"}, INVALID_NETWORK_CONFIG, "mtu: "),
        ({"mode": "passthru"}, INVALID_NETWORK_CONFIG, "mode: "),
        ({"interface": "other"}, UNSUPPORTED_FIELD, "interface: unknown key"),
        ({"interface": "other"}, UNSUPPORTED_FIELD, "the device that is allocated has it"),
        ({"source": "eth0"}, UNSUPPORTED_FIELD, "source"),
        ({"device": "tap"}, UNSUPPORTED_FIELD, "a macvtap"),
        ({"deviceID": "dataplaneMvp1"}, UNSUPPORTED_FIELD, "a claim cannot set it"),
        ({"runtimeConfig": {"mac": "02:00:00:00:00:01"}}, UNSUPPORTED_FIELD, "a claim cannot set it"),
        ({"name": "dataplane"}, UNSUPPORTED_FIELD, "a claim cannot set it"),
        ({"prevResult": {}}, UNSUPPORTED_FIELD, "a claim cannot set it"),
        ({"cni.dev/valid-attachments": []}, UNSUPPORTED_FIELD, "a claim cannot set it"),
        ({"cni.dev/other": 1}, UNSUPPORTED_FIELD, "unknown key"),
        ({"ifname": "eth0"}, INVALID_NETWORK_CONFIG, "ifname"),
        ({"ifname": "a%d"}, INVALID_NETWORK_CONFIG, "ifname"),
        ({"ifname": "a/b"}, INVALID_NETWORK_CONFIG, "ifname"),
        ({"kind": "Pod"}, INVALID_NETWORK_CONFIG, "kind"),
        ({"port": {"x": 1}}, UNSUPPORTED_FIELD, "port.x"),
        ("text", INVALID_NETWORK_CONFIG, "the document"),
        (None, INVALID_NETWORK_CONFIG, "the document"),
        ([], INVALID_NETWORK_CONFIG, "the document"),
    ],
)
def test_wrong_parameters_are_refused(parameters: object, code: int, words: str) -> None:
    error = refusal(claim(result(), configs=[config(parameters)]))
    assert error.code == code
    assert words in error.msg


def test_an_error_names_the_class() -> None:
    assert (
        "parameters of the class: mtu"
        in refusal(claim(result(), configs=[config({"mtu": 1}, of="FromClass")])).msg
    )


@pytest.mark.parametrize("field", [{"port": {"macSpoofCheck": False}}, {"ipam": {"type": "static"}}])
def test_a_claim_cannot_undo_what_its_class_narrows(field: dict[str, Any]) -> None:
    error = refusal(claim(result(), configs=[config(field, of="FromClass"), config(field)]))
    assert "the class sets it" in error.msg
    assert not only(claim(result(), configs=[config(field, of="FromClass")])).ipam_of_claim
    assert only(claim(result(), configs=[config(field)])).ipam_of_claim == ("ipam" in field)


MACS = ["02:00:00:00:00:01", "02:00:00:00:00:02"]


@pytest.mark.parametrize(
    ("networks", "found"),
    [
        ("", {}),
        ("[]", {}),
        ([{"claimName": "net", "requestName": "nic", "macs": MACS}], {"nic": MACS}),
        (
            [
                {"claimName": "gpu", "requestName": "nic", "macs": 7},
                {"claimName": "net", "requestName": "a", "macs": MACS[:1], "more": 1},
                {"claimName": "net", "requestName": "b"},
            ],
            {"a": MACS[:1], "b": []},
        ),
    ],
)
def test_macs_of_the_pods_annotation(networks: object, found: dict[str, list[str]]) -> None:
    text = networks if isinstance(networks, str) else json.dumps(networks)
    assert claims.macs(text, "net") == found


@pytest.mark.parametrize(
    "text",
    [
        *("{", "7", "null", "{}x", '["net"]', "[[]]", '[{"requestName": "nic"}]', "[" * 100_000),
        '[{"claimName": "net"}]',
        '[{"claimName": "net", "requestName": ["nic"], "macs": []}]',
        '[{"claimName": "net", "requestName": "nic", "macs": "02:00:00:00:00:01"}]',
        '[{"claimName": "net", "requestName": "nic", "macs": {"a": 1}}]',
        '[{"claimName": "net", "requestName": "nic", "macs": [7]}]',
    ],
)
def test_an_annotation_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(CniError, match=f"annotation {re.escape(claims.NETWORKS)}") as refused:
        claims.macs(text, "net")
    assert len(str(refused.value)) < 500


def test_an_interface_name_survives_the_pod_and_the_claim() -> None:
    template = {"annotations": {claims.POD_CLAIM: "nic"}}
    first = only(claim(result(), **template))
    again = only(claim(result(device="dataplane-3"), name="vm-a-nic-b2", uid="u2", **template))
    assert first.ifname == again.ifname != only(claim(result("two"), **template)).ifname
    assert len(first.ifname) <= 15
    one, two = claims.allocated(claim(result(), result(device="dataplane-1")))
    assert one.ifname != two.ifname


@pytest.mark.parametrize("field", [{"ifname": "net1"}, {"mac": "02:00:00:00:00:01"}])
def test_two_devices_do_not_share_what_is_ones(field: dict[str, str]) -> None:
    error = refusal(claim(result(), result(device="dataplane-1"), configs=[config(field)]))
    assert "request nic has 2 devices" in error.msg
    both = claim(result("a"), result("b", "dataplane-1"), configs=[config({"ifname": "net1"})])
    assert "net1 is given to two devices" in refusal(both).msg


def test_devices_of_other_drivers_are_not_ours() -> None:
    other = {**result(), "driver": "gpu.example.com"}
    assert claims.allocated(claim(other)) == []


def test_admin_access_is_refused() -> None:
    assert "adminAccess" in refusal(claim(result(adminAccess=True))).msg


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"status": {}},
        {"status": {"allocation": None}},
        {"status": {"allocation": {}}},
        {"metadata": {}, "status": {"allocation": {"devices": {"results": [{"driver": claims.DRIVER}]}}}},
        claim({"driver": claims.DRIVER, "request": "a"}),
    ],
)
def test_a_claim_that_is_not_allocated_is_refused(document: dict[str, Any]) -> None:
    assert refusal(document).code == INVALID_NETWORK_CONFIG


def test_a_claim_is_one_pods() -> None:
    assert claims.pod_of(claim(result())) == ("vm-a", "p1")
    pods = [{"resource": "pods", "name": name, "uid": name} for name in ("a", "b")]
    for reserved in (
        [],
        pods,
        [{"resource": "jobs", "name": "a", "uid": "a"}],
        [pods[0], {"resource": "jobs"}],
    ):
        with pytest.raises(CniError, match=r"reserved for \d consumers"):
            claims.pod_of(claim(result(), reserved=reserved))


@pytest.mark.parametrize("name", ["dataplane", "Up_Link.1", "a" * 50, "A" * 50, "a-1", "x."])
def test_device_names_are_dns_labels_that_lead_back(name: str) -> None:
    document = {
        "interfaces": [{"name": each, "source": {"dev": "eth1"}} for each in dict.fromkeys([name, "a", "x"])]
    }
    found = policy.of("f", document)
    for number in (0, 7, 99, None):
        device = claims.device_name(name, number)
        assert len(device) <= 63
        assert device == device.lower()
        assert device.replace("-", "a").isalnum()
        entry, back = claims.interface_of(found, device)
        assert (entry.name, back) == (name, number)


@pytest.mark.parametrize(
    "device", ["", "dataplane", "dataplane-", "dataplane-x", "other-0", "dataplane--1", "dataplane-01"]
)
def test_a_device_that_the_policy_does_not_have_is_refused(device: str) -> None:
    with pytest.raises(CniError, match="the node's policy has no interface of it"):
        claims.interface_of(POLICY, device)


def test_a_device_beyond_the_capacity_is_refused() -> None:
    with pytest.raises(CniError, match="offers 4 devices now"):
        claims.interface_of(POLICY, "dataplane-4")
