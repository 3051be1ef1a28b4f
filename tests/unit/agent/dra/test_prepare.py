"""prepare.py: all or nothing, again and again, and nothing left."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cni.agent import settings as agent_settings
from cni.agent.dra.metadata import Metadata
from cni.agent.dra.prepare import Prepared, Preparing
from cni.config import policy
from cni.errors import CniError
from cni.kernel.vf_settings import VfSettings
from cni.state import cdi, deviceid
from cni.state.claims import Claim, ClaimDevice, Claims
from cni.state.record import Record, VfLink, VirtualFunction, boot_id
from cni.state.store import Store
from tests.unit.agent.dra.standin import StandIn
from tests.unit.config.test_claim import claim, config, result

UID = "u1"
FILE = {"interfaces": [{"name": "dataplane", "source": {"dev": "eth1"}, "modes": ["bridge"], "capacity": 4}]}


class Node:
    """A state folder, a CDI folder, and the API server's stand-in."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = Store(tmp_path / "run")
        self.store.prepare()
        self.cdi = tmp_path / "cdi"
        self.folder = tmp_path
        self.api = StandIn()
        self.policy: policy.Policy | None = policy.of("f", FILE)
        self.allocated: dict[int, str] = {}
        self.ended: list[str] = []
        self.end_error: CniError | None = None
        settings = agent_settings.load([f"--run={tmp_path}/run", f"--cdi={self.cdi}"])
        self.claims = Claims(settings.run)
        self.preparing = Preparing(
            settings,
            self.store,
            Metadata(settings.run),
            self.api,
            policy=lambda: self.policy,
            attributes=lambda: {"dataplane-0": {"mtu": {"int": 1500}}},
            end=self._end,
            allocated=lambda: self.allocated,
        )

    def _end(self, claim: Claim, device: ClaimDevice) -> None:
        if self.end_error:
            raise self.end_error
        self.ended.append(device.ifname)

    def offer(
        self, *results: dict[str, Any], configs: Any = (), reserved: Any = None, **metadata: Any
    ) -> None:
        self.api.claims["vms/c"] = claim(*results, configs=configs, reserved=reserved, **metadata)

    def prepare(self) -> list[Prepared]:
        return self.preparing.prepare("vms", "c", UID)

    def refusal(self) -> str:
        with pytest.raises(CniError) as refused:
            self.prepare()
        return str(refused.value)

    def files(self) -> set[str]:
        """What there is, without the lock."""
        paths = [*self.folder.rglob("*")]
        return {
            str(p.relative_to(self.folder))
            for p in paths
            if (p.is_symlink() or p.is_file()) and p.name != "lock"
        }

    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.cdi / f"vmtap-claim-{UID}.json").read_text())
        return found

    def reserved(self) -> dict[int, str]:
        return dict(self.store.reserved())

    def prepare_another(self, number: int) -> int:
        """Prepare the claim of another pod. Returns the number of the interface's device that it has reserved."""
        uid = f"more{number}"
        pod = [{"resource": "pods", "name": uid, "uid": uid}]
        self.api.claims["vms/more"] = claim(result(device="dataplane-0"), reserved=pod, uid=uid)
        self.preparing.prepare("vms", "more", uid)
        held = [index for index, id in self.reserved().items() if id.startswith(uid)]
        [found] = deviceid.numbers("dataplane", held)
        return found


@pytest.fixture
def node(tmp_path: Path) -> Node:
    made = Node(tmp_path)
    made.offer(result(), configs=[config({"ifname": "net1", "mac": "02:00:00:00:00:07"})])
    return made


def test_what_it_leaves_is_what_an_attach_needs(node: Node) -> None:
    assert node.prepare() == [Prepared("nic", "node", "dataplane-0", f"vmtap.dev/claim={UID}-0")]
    found = node.claims.load(UID)
    assert found
    [device] = found.devices
    assert (found.pod_uid, found.pod_name, found.namespace, found.name) == ("p1", "vm-a", "vms", "c")
    assert (device.ifname, device.mac, device.network) == ("net1", "02:00:00:00:00:07", "claim-nic")
    assert device.args == "IgnoreUnknown=1;K8S_POD_NAMESPACE=vms;K8S_POD_NAME=vm-a;K8S_POD_UID=p1"
    last = deviceid.ifindex("dataplane", 3)
    assert node.reserved() == dict.fromkeys((device.ifindex, last), found.attachment(device))
    assert node.store.reserve_ifindex(found.attachment(device)) == device.ifindex  # what ADD does


def test_the_cdi_spec(node: Node) -> None:
    node.prepare()
    found = node.claims.load(UID)
    assert found
    index = found.devices[0].ifindex
    spec = node.spec()
    [hook] = spec["containerEdits"]["hooks"]
    assert hook["hookName"] == "createRuntime"
    assert (hook["path"], hook["args"]) == ("/opt/cni/bin/vmtap-hook", ["vmtap-hook", UID])
    assert hook["env"] == [f"VMTAP_RUN={node.folder}/run"]
    [device] = spec["devices"]
    assert (spec["kind"], device["name"]) == ("vmtap.dev/claim", f"{UID}-0")
    [made] = device["containerEdits"]["deviceNodes"]
    assert made["path"] == f"/dev/tap{index}"
    assert (made["type"], made["major"], made["minor"]) == ("c", 1, 3)
    assert (made["fileMode"], made["uid"], made["gid"]) == (0o660, 107, 107)
    [mount] = device["containerEdits"]["mounts"]
    inside = "/var/run/kubernetes.io/dra-device-attributes/resourceclaims/c/nic/vmtap.dev-metadata.json"
    assert mount["containerPath"] == inside
    assert "ro" in mount["options"]


def test_metadata_of_a_template_and_after_the_attach(node: Node, tmp_path: Path) -> None:
    annotation = {"resource.kubernetes.io/pod-claim-name": "net"}
    node.offer(result("a"), result("a", "dataplane-1"), result("b/x", "dataplane-2"), annotations=annotation)
    node.prepare()
    mounts = [each["containerEdits"].get("mounts") for each in node.spec()["devices"]]
    assert mounts[1] is None  # one file for a request
    assert "/resourceclaimtemplates/net/a/" in mounts[0][0]["containerPath"]
    assert "/resourceclaimtemplates/net/b/" in mounts[2][0]["containerPath"]
    path = Path(mounts[0][0]["hostPath"])
    assert path.stat().st_mode & 0o777 == 0o644
    before = json.loads(path.read_text())
    assert (before["podClaimName"], before["metadata"]["uid"], before["metadata"]["generation"]) == (
        "net",
        UID,
        1,
    )
    [request] = before["requests"]
    assert request["devices"][0] == {
        "driver": "vmtap.dev",
        "pool": "node",
        "name": "dataplane-0",
        "attributes": {"mtu": {"int": 1500}},
    }
    found = node.claims.load(UID)
    assert found
    metadata = Metadata(f"{tmp_path}/run")
    assert metadata.attached(found, [record(found, found.devices[0])])
    after = json.loads(path.read_text())
    assert after["metadata"]["generation"] == 2
    assert after["requests"][0]["devices"][0]["networkData"] == {
        "interfaceName": found.devices[0].ifname,
        "hardwareAddress": "02:00:00:00:00:01",
        "ips": ["10.1.0.5/24"],
    }
    assert "networkData" not in after["requests"][0]["devices"][1]
    assert path.stat().st_mode & 0o777 == 0o644
    assert not metadata.attached(found, [record(found, found.devices[0])])
    node.prepare()
    assert json.loads(path.read_text()) == after
    assert json.loads(Path(mounts[2][0]["hostPath"]).read_text())["requests"][0]["name"] == "b/x"


def test_metadata_is_replaced_whole_or_not_at_all(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.prepare()
    found = node.claims.load(UID)
    assert found
    [mount] = node.spec()["devices"][0]["containerEdits"]["mounts"]
    path, metadata = Path(mount["hostPath"]), Metadata(f"{node.folder}/run")
    before = path.read_text()
    with path.open() as reader:  # of a container
        begin = reader.read(10)
        metadata.attached(found, [record(found, found.devices[0])])
        assert begin + reader.read() == before
    after = path.read_text()
    with monkeypatch.context() as patched:
        write = os.write
        patched.setattr(os, "write", lambda fd, data: write(fd, data[:7]))  # the file system is full
        with pytest.raises(CniError, match="device metadata"):
            metadata.attached(found, [replace(record(found, found.devices[0]), mac="02:00:00:00:00:02")])
    assert path.read_text() == after
    assert os.listdir(path.parent) == [path.name]


def test_metadata_of_a_device_that_two_requests_share(node: Node) -> None:
    node.prepare()
    found = node.claims.load(UID)
    assert found
    names = {"a": "02:00:00:00:00:0a", "b": "02:00:00:00:00:0b"}
    devices = [replace(found.devices[0], request=each, ifname=each, share=each) for each in names]
    shared = replace(found, devices=tuple(devices))
    metadata = Metadata(f"{node.folder}/run")
    mounts = metadata.write(shared, node.api.claims["vms/c"], {})
    metadata.attached(
        shared, [replace(record(shared, each), mac=names[each.request]) for each in shared.devices]
    )
    for number, mac in enumerate(names.values()):
        [request] = json.loads(Path(mounts[number][0]).read_text())["requests"]
        assert [each["networkData"]["hardwareAddress"] for each in request["devices"]] == [mac]


def test_metadata_has_the_address_of_the_function_that_was_taken(node: Node, tmp_path: Path) -> None:
    """Which another attachment may have made another one than that of the slices."""
    node.prepare()
    found = node.claims.load(UID)
    assert found
    link = VfLink("02:00:00:00:00:03", 1500, 0, "", ipv6=True, pinned=False)
    function = VirtualFunction("0000:01:10.2", 1, "igbvf", VfSettings(), VfSettings(), link)
    Metadata(f"{tmp_path}/run").attached(found, [replace(record(found, found.devices[0]), vf=function)])
    document = json.loads((tmp_path / f"run/metadata/{UID}/nic.json").read_text())
    assert document["requests"][0]["devices"][0]["attributes"] == {
        "mtu": {"int": 1500},
        "resource.kubernetes.io/pciBusID": {"string": "0000:01:10.2"},
    }


def record(claim: Claim, device: ClaimDevice) -> Record:
    return Record(
        network=device.network,
        container_id=claim.uid,
        ifname=device.ifname,
        netns="/run/netns/x",
        netns_id=(4, 1),
        nsid=0,
        device="macvtap",
        ifindex=device.ifindex,
        mac="02:00:00:00:00:01",
        mtu=1500,
        queues=1,
        boot_id=boot_id(),
        ips=({"address": "10.1.0.5/24"},),
    )


def test_it_is_idempotent_and_restores_what_is_gone(node: Node) -> None:
    first = node.prepare()
    files, claimed = node.files(), node.claims.load(UID)
    assert node.prepare() == first
    for path in node.folder.rglob("*"):  # as after a reboot: neither the reservation nor the spec is there
        if path.is_symlink() or "vmtap-claim" in path.name:
            path.unlink()
    assert node.prepare() == first
    assert (node.files(), node.claims.load(UID)) == (files, claimed)
    assert node.ended == []


def test_a_later_call_keeps_the_index_though_an_earlier_candidate_is_free(node: Node) -> None:
    def index() -> int:
        node.prepare()
        claim = node.claims.load(UID)
        assert claim
        return claim.devices[0].ifindex

    first = index()
    node.preparing.unprepare(UID)
    taken = node.store.folder + f"/ifindex/{first}"
    os.symlink("another", taken)
    second = index()
    assert second != first
    os.unlink(taken)
    assert index() == second


def test_unprepare_leaves_nothing(node: Node) -> None:
    before = node.files()
    node.prepare()
    node.preparing.unprepare(UID)
    assert node.files() == before
    assert node.ended == ["net1"]
    node.preparing.unprepare(UID)  # a kubelet repeats it
    node.preparing.unprepare("never-prepared")
    assert node.files() == before


def test_unprepare_without_a_readable_claim_removes_what_it_can(node: Node) -> None:
    node.prepare()
    (node.folder / f"run/claims/{UID}.json").write_text("{")
    node.preparing.unprepare(UID)
    assert {
        path for path in node.files() if "ifindex" not in path
    } == set()  # the reconciler removes the index


def test_an_attachment_that_cannot_be_ended_keeps_the_claim(node: Node) -> None:
    node.prepare()
    files = node.files()
    node.end_error = CniError(11, "busy")
    with pytest.raises(CniError, match="busy"):
        node.preparing.unprepare(UID)
    assert node.files() == files
    node.end_error = None
    node.preparing.unprepare(UID)
    assert node.files() == set()


@pytest.mark.parametrize("step", ["claims", "metadata", "cdi", "reservation"])
def test_a_step_that_fails_is_undone(node: Node, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node.offer(result("a"), result("b", "dataplane-1"))
    before = node.files()

    def fail(*_: object, **__: object) -> None:
        raise CniError(5, "the file system is full")

    with monkeypatch.context() as patched:
        if step == "claims":
            patched.setattr(Claims, "save", fail)
        elif step == "metadata":
            patched.setattr(Metadata, "write", fail)
        elif step == "cdi":
            patched.setattr(cdi, "write_claim", fail)
        else:
            reserve, calls = node.store.reserve_ifindex, iter((False, True))
            patched.setattr(
                node.store, "reserve_ifindex", lambda id, **_: fail() if next(calls) else reserve(id)
            )
        assert "full" in node.refusal()
    assert node.files() == before
    node.prepare()


def test_a_failure_of_a_later_call_leaves_the_prepared_claim(node: Node) -> None:
    node.prepare()
    files = node.files()
    node.policy = policy.of("f", {"interfaces": []})
    assert "no interface of it now" in node.refusal()
    assert node.files() == files


def test_a_claim_that_another_pod_has_now_is_prepared_anew(node: Node) -> None:
    node.prepare()
    node.offer(result(), reserved=[{"resource": "pods", "name": "vm-b", "uid": "p2"}])
    node.prepare()
    assert node.ended == ["net1"]
    found = node.claims.load(UID)
    assert found
    assert (found.pod_uid, found.pod_name) == ("p2", "vm-b")
    assert {*node.reserved().values()} == {found.attachment(each) for each in found.devices}


@pytest.mark.parametrize(
    ("offered", "words"),
    [
        ({"results": (result(),), "uid": "u2"}, "has UID u2, and not u1"),
        ({"results": ()}, "has no device of vmtap.dev"),
        ({"results": (result(device="other-0"),)}, "no interface of it now; interfaces are: dataplane"),
        ({"results": (result(),), "configs": [config({"mode": "vepa"})]}, "request nic: mode: "),
        ({"results": (result(),), "configs": [config({"mtuu": 1})]}, "parameters of the claim: mtuu"),
        (
            {"results": (result(),), "configs": [config({"ipam": {"type": "host-local"}})]},
            "ipamTypes of the policy",
        ),
        ({"results": (result(),), "configs": [config({"ipam": {"type": "dhcp"}})]}, "request nic: ipam.type"),
        ({"results": (result(),), "reserved": []}, "reserved for 0 consumers"),
        (
            {
                "results": (result(), result("b", "dataplane-1")),
                "configs": [config({"mac": "01:00:00:00:00:01"}, "b")],
            },
            "request b: mac",
        ),
    ],
)
def test_a_refusal_is_one_that_a_user_understands_and_leaves_nothing(
    node: Node, offered: dict[str, Any], words: str
) -> None:
    before = node.files()
    node.offer(*offered.pop("results"), **offered)
    assert words in node.refusal()
    assert node.files() == before


def test_an_ipam_plugin_by_the_policy_or_the_class(node: Node) -> None:
    ipam = {"ipam": {"type": "host-local"}}
    node.offer(result(), configs=[config(ipam, of="FromClass")])
    node.prepare()
    node.preparing.unprepare(UID)
    node.offer(result(), configs=[config(ipam)])
    assert "set ipam in the DeviceClass" in node.refusal()
    assert node.policy
    node.policy = replace(node.policy, ipam_types=("host-local",))
    node.prepare()
    node.preparing.unprepare(UID)
    node.policy = replace(node.policy, ipam_types=())
    assert "ipamTypes" in node.refusal()


def test_without_a_policy_nothing_is_prepared(node: Node) -> None:
    node.policy = None
    assert "no policy file" in node.refusal()


def test_a_claim_that_is_gone(node: Node) -> None:
    node.api.claims.clear()
    assert "ResourceClaim vms/c: the API server answered 404" in node.refusal()


def test_the_spec_is_where_a_runtime_finds_it(node: Node) -> None:
    node.prepare()
    assert os.listdir(node.cdi) == [f"vmtap-claim-{UID}.json"]
    assert cdi.claim_path(str(node.cdi), UID) == f"{node.cdi}/vmtap-claim-{UID}.json"


def test_a_later_call_keeps_the_mac_of_the_pods_annotation(node: Node) -> None:
    node.offer(result(), annotations={"resource.kubernetes.io/pod-claim-name": "net"})
    node.prepare()
    found = node.claims.load(UID)
    assert found
    assert (found.in_pod, found.devices[0].mac) == ("net", None)
    settled = replace(found, devices=(replace(found.devices[0], mac="02:00:00:00:00:09"),))
    node.claims.save(settled)
    node.prepare()
    assert node.claims.load(UID) == settled


def test_shares_of_one_device(node: Node) -> None:
    """Two requests of one claim have two shares: two links, and each a part of the capacity."""
    results = [result(each, "dataplane-shared", shareID=f"share-{each}") for each in ("a", "b")]
    node.offer(*results)
    assert [each.device for each in node.prepare()] == ["dataplane-shared"] * 2
    found = node.claims.load(UID)
    assert found
    assert [each.share for each in found.devices] == ["share-a", "share-b"]
    assert len({each.ifindex for each in found.devices} | {each.ifname for each in found.devices}) == 4
    assert len(deviceid.numbers("dataplane", node.reserved())) == 2


def test_a_virtual_function_is_no_shared_device(node: Node) -> None:
    node.policy = policy.of("f", {"interfaces": [FILE["interfaces"][0] | {"type": "sr-iov"}]})
    node.offer(result(device="dataplane-shared"))
    assert "no interface of it now" in node.refusal()


class TestCapacity:
    """Of the interface dataplane, which has 4 devices for claims and the device plugin together."""

    def test_claims_take_the_last_device_that_nobody_has(self, node: Node) -> None:
        node.store.reserve_ifindex("attached", "dataplaneMvp3")
        node.allocated = {deviceid.ifindex("dataplane", 1): "dataplaneMvp1"}  # and not attached yet
        assert [node.prepare_another(number) for number in range(2)] == [2, 0]
        files = node.files()
        node.offer(result())
        assert "dataplane has 4 devices, for claims and the device plugin together" in node.refusal()
        assert node.files() == files
        node.allocated = {}
        node.prepare()

    def test_the_device_plugin_does_not_get_a_claims_device(self, node: Node) -> None:
        node.prepare()
        with pytest.raises(CniError, match="has it still"):
            node.store.reserve_ifindex("attached", "dataplaneMvp3")
        node.preparing.unprepare(UID)
        node.store.reserve_ifindex("attached", "dataplaneMvp3")

    def test_a_lower_capacity_leaves_what_is_there_and_counts_it(self, node: Node) -> None:
        node.prepare()
        node.prepare_another(1)
        files = node.files()
        node.policy = policy.of("f", {"interfaces": [FILE["interfaces"][0] | {"capacity": 2}]})
        node.prepare()
        assert node.files() == files
        with pytest.raises(CniError, match="all are taken"):
            node.prepare_another(2)

    def test_what_an_attach_ends_keeps_the_device(self, node: Node) -> None:
        """An attachment's end forgets its record, and the claim stays."""
        node.prepare()
        reserved = node.reserved()
        found = node.claims.load(UID)
        assert found
        [device] = found.devices
        node.store.forget_id(found.attachment(device), keep=device.ifindex)
        assert node.reserved() == reserved
