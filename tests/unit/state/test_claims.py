"""claims.py: a claim is kept whole or not at all, and a file that is none is never half believed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cni.errors import CniError
from cni.spec import IO_FAILURE
from cni.state.claims import Claim, ClaimDevice, Claims, decode
from cni.state.record import identifier

UID = "8c6a2f5e-6c1b-4f0e-9a57-0d1f5a1f7a10"
DEVICE = ClaimDevice(
    request="nic",
    device="dataplane-0",
    pool="node1",
    share="",
    ifname="net1",
    ifindex=0x10000001,
    mac=None,
    config={"cniVersion": "1.1.0", "name": "claim-nic", "type": "vmtap", "interface": "dataplane"},
    args="IgnoreUnknown=1;K8S_POD_NAMESPACE=vms;K8S_POD_NAME=vm-a;K8S_POD_UID=p1",
)
CLAIM = Claim(uid=UID, namespace="vms", name="vm-a-nic", pod_uid="p1", pod_name="vm-a", devices=(DEVICE,))


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path)


def _document(**changed: object) -> bytes:
    return json.dumps(asdict(CLAIM) | changed).encode()


def test_a_claim_comes_back_as_it_went(claims: Claims) -> None:
    assert claims.all() == []
    claims.save(CLAIM)
    assert claims.load(UID) == CLAIM
    assert claims.all() == [CLAIM]
    claims.remove(UID)
    claims.remove(UID)
    assert claims.load(UID) is None
    assert claims.all() == []


def test_files_are_private(claims: Claims, tmp_path: Path) -> None:
    claims.save(CLAIM)
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "claims").rglob("*")} == {0}
    assert (tmp_path / "claims").stat().st_mode & 0o077 == 0


def test_the_claims_of_a_pod(claims: Claims) -> None:
    other = replace(CLAIM, uid="other", pod_uid="p2")
    claims.save(CLAIM)
    claims.save(other)
    assert claims.of_pod("p1") == [CLAIM]
    assert claims.of_pod("p2") == [other]
    assert claims.of_pod("") == []


def test_the_attachment_has_the_claims_uid_for_its_container_id() -> None:
    assert CLAIM.attachment(DEVICE) == identifier("claim-nic", UID, "net1")


def test_a_field_that_a_later_version_adds_is_left_out() -> None:
    devices = [asdict(DEVICE) | {"later": 1}]
    assert decode(UID, _document(later=[1], devices=devices)) == CLAIM


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        _document(uid="another"),
        _document(pod_uid=7),
        _document(devices={}) + b"x",
        _document(devices=["x"]),
        _document(devices=None),
        _document(devices=[asdict(DEVICE) | {"ifindex": "1"}]),
        _document(devices=[asdict(DEVICE) | {"ifindex": True}]),
        _document(devices=[asdict(DEVICE) | {"config": {}}]),
        _document(devices=[asdict(DEVICE) | {"config": {"name": "a/b"}}]),
        _document(devices=[asdict(DEVICE) | {"ifname": "../x"}]),
        _document(devices=[{key: value for key, value in asdict(DEVICE).items() if key != "args"}]),
        _document(name="x" * (1 << 20)),
    ],
)
def test_a_file_that_is_no_claim_is_set_aside(tmp_path: Path, data: bytes) -> None:
    notes: list[str] = []
    claims = Claims(tmp_path, notes.append)
    claims.save(CLAIM)
    (tmp_path / "claims" / f"{UID}.json").write_bytes(data)
    assert claims.all() == []
    assert (tmp_path / "claims" / f"{UID}.bad").read_bytes() == data
    assert "was set aside as .bad" in notes[0]
    claims.remove(UID)
    assert list((tmp_path / "claims").iterdir()) == []


@pytest.mark.parametrize("uid", ["", "../x", "a/b", ".json", "x\0"])
def test_a_uid_names_no_other_file(claims: Claims, uid: str) -> None:
    with pytest.raises(CniError, match="is not the UID of a claim") as refused:
        claims.load(uid)
    assert refused.value.code == IO_FAILURE


def test_a_full_or_broken_file_system_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("")
    for call in (Claims(tmp_path).all, lambda: Claims(tmp_path).save(CLAIM)):
        with pytest.raises(CniError, match="cannot be kept or read") as refused:
            call()
        assert refused.value.code == IO_FAILURE
