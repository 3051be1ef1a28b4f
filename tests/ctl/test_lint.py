"""vmtapctl lint: what it recognises in a file, and that it judges a network config as ADD does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from cni.attach import result
from cni.config import netconf, policy
from cni.ctl import lint as product
from cni.errors import CniError
from tests.faults.test_fuzz import json_values, known, stdins
from tests.runner import BIN
from tests.waiting import LIMIT

GOOD = {"cniVersion": "1.1.0", "name": "n", "type": "vmtap", "source": "eth1"}


def lint(*words: str | Path, status: int = 0) -> list[str]:
    done = subprocess.run(
        [BIN / "vmtapctl", "lint", *words], capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (json.dumps(GOOD), []),
        (json.dumps({"name": "n", "cniVersion": "1.0.0", "plugins": [{"type": "vmtap", "source": "e"}]}), []),
        ("interfaces: [{name: a, source: {dev: eth1}}]", []),
        ("logLevel: debug", []),
        (json.dumps(GOOD | {"mod": "vepa", "mtu": "5"}), ["mod: unknown key", 'mtu: "5" is not allowed']),
        (json.dumps(GOOD | {"ipam": {"type": "dhcp"}}), ['ipam.type: "dhcp" is refused']),
        (json.dumps(GOOD | {"ipam": {"type": "dhcp"}, "addressing": "link"}), []),
        (json.dumps({"name": "n", "type": "bridge"}), ["no plugin in it is of type vmtap or macvtap"]),
        ("interfaces: [{name: a}]", ["interfaces[0].source: is missing"]),
        ("logLevel: loud", ['logLevel: "loud" is not allowed']),
        ("{", ["Expecting property name"]),
        ("a: b: c", ["line 1, column 5"]),
    ],
)
def test_lint(tmp_path: Path, text: str, faults: list[str]) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    file.chmod(0o666)  # whose it is does not matter here
    lines = lint(file, status=2 if faults else 0)
    assert len(lines) == max(1, len(faults)), lines
    for line, fault in zip(lines, faults, strict=False):
        assert line.startswith(f"{file}: {fault}") or fault in line
    if not faults:
        assert ": valid " in lines[0]


def test_lint_by_a_policy(tmp_path: Path) -> None:
    conf, rules = tmp_path / "a.conf", tmp_path / "policy.yaml"
    conf.write_text(json.dumps(GOOD | {"mode": "vepa"}))
    rules.write_text("interfaces: [{name: a, source: {dev: eth1}, modes: [bridge]}]")
    lint(conf)
    [line] = lint(conf, "--policy", rules, status=2)
    assert "on eth1 the policy allows bridge" in line


def test_lint_a_file_that_is_not_there() -> None:
    [line] = lint("/nowhere/at/all", status=2)
    assert "No such file" in line


ROOT = Path(__file__).parents[2]
BOM = b"\xef\xbb\xbf"
RESOURCE = {"k8s.v1.cni.cncf.io/resourceName": "macvtap.network.kubevirt.io/dataplane"}
POLICY = "interfaces:\n- {name: dataplane, source: {dev: eth1}, modes: [vepa]}\n"
PLAIN = {"cniVersion": "1.0.0", "name": "n", "type": "vmtap"}


def faults(tmp_path: Path, text: str | bytes, rules: str | None = None) -> tuple[str, ...]:
    file = tmp_path / "file"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return product.check(str(file), policy.of("policy", yaml.safe_load(rules)) if rules else None).faults


def nad(config: object, annotations: dict[str, str] | None = None, name: str = "net") -> dict[str, Any]:
    return {
        "apiVersion": "k8s.cni.cncf.io/v1",
        "kind": "NetworkAttachmentDefinition",
        "metadata": {"name": name, "namespace": "vms", "annotations": annotations or {}},
        "spec": {"config": config if isinstance(config, str) else json.dumps(config)},
    }


def configmap(**data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "files"}, "data": data}


OTHER = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"interfaces": []}}


def shapes(*objects: dict[str, Any]) -> dict[str, str]:
    """The objects in one file, in the ways in which they are written."""
    items = {"apiVersion": "v1", "kind": "List", "items": list(objects), "metadata": {"resourceVersion": ""}}
    return {
        "documents": yaml.safe_dump_all(objects, sort_keys=False),
        "documents with comments": "# a comment\n---\n"
        + yaml.safe_dump_all(objects, explicit_start=True, sort_keys=False),
        "list in YAML": yaml.safe_dump(items, sort_keys=False),
        "list in JSON": json.dumps(items, indent=4),
        "typed list": yaml.safe_dump(items | {"kind": "NetworkAttachmentDefinitionList"}, sort_keys=False),
    }


@pytest.mark.parametrize("shape", shapes())
def test_manifests(tmp_path: Path, shape: str) -> None:
    objects = [
        OTHER,
        nad(GOOD | {"mtuu": 1}, name="bad"),
        nad(GOOD, name="good"),
        nad({"name": "x", "plugins": [{"type": "tuning"}, GOOD | {"mode": "flat"}]}, name="chain"),
        nad({"cniVersion": "1.0.0", "type": "bridge", "wrong": 1}, name="others"),
        nad('{"type":"vmtap","name":"a","name":"b"}', name="twice"),
        configmap(
            **{"interfaces.yaml": "interfaces: [{name: a}]", "agent.yaml": "logLevel: loud", "x": "{{"}
        ),
        configmap(**{"10-net.conflist": json.dumps(GOOD | {"vlan": 9999}), "text": "hello: world"}),
    ]
    found = faults(tmp_path, shapes(*objects)[shape])
    assert [text.partition(": ")[0] + "|" + text.split(": ")[1] for text in found] == [
        "NetworkAttachmentDefinition vms/bad|spec.config",
        "NetworkAttachmentDefinition vms/chain|spec.config",
        "NetworkAttachmentDefinition vms/twice|spec.config",
        "ConfigMap files|data.interfaces.yaml",
        "ConfigMap files|data.agent.yaml",
        "ConfigMap files|data.10-net.conflist",
    ]
    for text, what in zip(
        found, ("mtuu", '"flat"', "stands twice", "source: is missing", '"loud"', "9999"), strict=True
    ):
        assert what in text
    assert not faults(tmp_path, shapes(OTHER, nad(GOOD), configmap(x=POLICY))[shape])


def test_one_object(tmp_path: Path) -> None:
    for text in (json.dumps(nad(GOOD)), yaml.safe_dump(nad(GOOD))):
        assert not faults(tmp_path, text)
    assert "no network in it is of type vmtap" in faults(tmp_path, json.dumps(OTHER))[0]
    assert "give a string" in faults(tmp_path, json.dumps(nad("") | {"spec": {"config": GOOD}}))[0]


def claim_kind(kind: str, parameters: object, driver: str = "vmtap.dev") -> dict[str, Any]:
    """A DeviceClass, ResourceClaim or ResourceClaimTemplate with the parameters."""
    spec: dict[str, Any] = {"config": [{"opaque": {"driver": driver, "parameters": parameters}}]}
    if kind != "DeviceClass":
        spec = {"devices": spec}
    if kind == "ResourceClaimTemplate":
        spec = {"spec": spec}
    return {"apiVersion": "resource.k8s.io/v1", "kind": kind, "metadata": {"name": "nic"}, "spec": spec}


@pytest.mark.parametrize("kind", ["DeviceClass", "ResourceClaim", "ResourceClaimTemplate"])
def test_parameters_of_claims(tmp_path: Path, kind: str) -> None:
    bad = claim_kind(kind, {"mtuu": 1500, "vlan": 9999})
    for text in shapes(OTHER, bad).values():
        first, second = faults(tmp_path, text)
        assert first.startswith(f"{kind} nic: spec.")
        assert "config[0].opaque.parameters: mtuu: unknown key" in first
        assert "vlan: 9999 is not allowed" in second
    assert not faults(tmp_path, yaml.safe_dump(claim_kind(kind, {"mtu": 1500, "ifname": "net1"})))
    assert (
        "no claim or class has parameters"
        in faults(tmp_path, json.dumps(claim_kind(kind, {}, "gpu.example")))[0]
    )
    for broken in ({"spec": 7}, {"spec": {"config": 7, "devices": [], "spec": None}}):
        assert "no claim or class" in faults(tmp_path, json.dumps(bad | broken))[0]


def test_the_manifests_of_the_project() -> None:
    for name in ("deviceclass", "claimtemplate"):
        assert product.check(str(ROOT / f"deploy/examples/dra/{name}.yaml")).faults == ()
    for file in sorted((ROOT / "deploy/kubevirt").glob("*.yaml")):
        if "NetworkAttachmentDefinition" in file.read_text():
            assert product.check(str(file)).faults == ()


def test_a_device_of_the_kubelet(tmp_path: Path) -> None:
    """The annotation gives it, without which the source is missing."""
    assert not faults(tmp_path, json.dumps(nad(PLAIN, RESOURCE)))
    for text in (json.dumps(nad(PLAIN)), json.dumps(PLAIN)):
        assert "interface: is missing" in faults(tmp_path, text)[0]
    assert not faults(tmp_path, json.dumps(nad(PLAIN | {"mode": "vepa"}, RESOURCE)), POLICY)
    assert (
        "dataplane allows vepa"
        in faults(tmp_path, json.dumps(nad(PLAIN | {"mode": "pepa"}, RESOURCE)), POLICY)[0]
    )
    other = dict.fromkeys(RESOURCE, "macvtap.network.kubevirt.io/other")
    assert "no interface other" in faults(tmp_path, json.dumps(nad(PLAIN, other)), POLICY)[0]


def test_multus_gives_a_name(tmp_path: Path) -> None:
    unnamed = {key: value for key, value in GOOD.items() if key != "name"}
    assert not faults(tmp_path, json.dumps(nad(unnamed)))
    assert faults(tmp_path, json.dumps(unnamed))[0].startswith("name: is missing")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (BOM + json.dumps(GOOD).encode(), "byte order mark"),
        (b'{"type":"vmtap","name":"a","name":"b"}', "stands twice"),
        (json.dumps(GOOD | {"plugins": 1}).encode(), "plugins: 1 is not allowed; give a list"),
        (json.dumps(PLAIN | {"source": "e", "cniVersion": "0.1.0"}).encode(), "without an IP address"),
        (json.dumps(GOOD | {"device": "tap", "mode": "vepa"}).encode(), "a tap is a port of a bridge"),
        (b"{" + b" " * (1 << 20), "larger than"),
    ],
)
def test_what_add_refuses(tmp_path: Path, text: bytes, fault: str) -> None:
    (found,) = faults(tmp_path, text)
    assert fault in found
    assert "Errno" not in found


def test_a_policy_in_braces(tmp_path: Path) -> None:
    assert not faults(tmp_path, "{interfaces: [{name: a, source: {dev: eth1}}]}")
    assert not faults(tmp_path, BOM + b"interfaces: []")
    assert "interfaces[0].source" in faults(tmp_path, '{"interfaces": [{"name": "a"}]}')[0]


def _refusal(text: bytes, called_as: str) -> CniError | None:
    """What ADD answers that has not looked at the node."""
    try:
        conf = netconf.parse(text, called_as=called_as)
        result.require_address(conf)
        if not (conf.interface or conf.device_id):
            policy.authorize(None, conf)
    except CniError as error:
        return error
    return None


def test_lint_and_add_agree(tmp_path: Path) -> None:
    changed = st.builds(
        lambda key, value: json.dumps({**GOOD, key: value}).encode(), st.sampled_from(known), json_values
    )
    odd: st.SearchStrategy[Any] = st.sampled_from(
        [None, 0, "", "0", "1500", [], {}, False, "\0", "\ud800", 1e999, 1500.0, "02-AB-00-00-10-01"]
    )
    nothing = st.builds(
        lambda key, value: json.dumps({**GOOD, key: value}).encode(), st.sampled_from(known), odd
    )

    @settings(
        max_examples=400,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        derandomize=True,
        database=None,
    )
    @given(text=changed | nothing | stdins, prefix=st.sampled_from([b"", b"", b" \n", BOM]))
    @example(text=b'{"type":"vmtap","type":"vmtap"}', prefix=b"")
    def holds(text: bytes, prefix: bytes) -> None:
        text = prefix + text
        file = tmp_path / "file"
        file.write_bytes(text)
        verdict = product.check(str(file))
        assert all(fault and "Errno" not in fault and "Traceback" not in fault for fault in verdict.faults)
        try:
            kind = netconf.Document(text).decoded().get("type")
        except CniError:
            event("not decoded")
            assert verdict.faults or verdict.kind != "network config"
            return
        if kind in product.TYPES:
            refusal = _refusal(text, kind)
            event("refused" if refusal else "accepted")
            assert verdict.kind == "network config"
            assert bool(verdict.faults) == bool(refusal), (verdict, refusal)
            if refusal and "interface: is missing" not in refusal.msg:
                assert verdict.faults[0] == refusal.msg

    holds()
