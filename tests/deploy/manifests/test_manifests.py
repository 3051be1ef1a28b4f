"""The chart and the kustomizations: good objects, the same objects, and right with what they are about.

Not in `make test`: helm and kustomize are built from their Go modules (make test-cluster).
"""

from __future__ import annotations

import os
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cni.config import nodefile, schema
from lab.kubernetes import manifests
from lab.kubernetes.manifests import Document
from lab.process import LabError

DEPLOY = Path(__file__).parents[3] / "deploy"
CHART = DEPLOY / "helm/vmtap"
KUSTOMIZE = DEPLOY / "kustomize"
OVERLAYS = ("kind", "kind-broker", "k3s", "openshift", "dra")
KUSTOMIZATIONS = ["base", *(f"overlays/{name}" for name in OVERLAYS), "uninstall", "monitoring"]

DATA = {"name": "dataplane", "source": {"dev": "eth0"}, "modes": ["bridge"], "capacity": 16}
K3S = {"cni": {"binDir": "/var/lib/rancher/k3s/data/cni"}}
OPENSHIFT = {"cni": {"binDir": "/var/lib/cni/bin"}, "openshift": {"enabled": True}}
DRA = {"dra": {"enabled": True}}
MONITORING = {"monitoring": {"podMonitor": {"enabled": True}, "alerts": {"enabled": True}}}
EVERYTHING: Document = {
    **OPENSHIFT,
    "image": {"digest": "sha256:" + 64 * "0"},
    "imagePullSecrets": [{"name": "registry"}],
    "interfaces": [DATA],
    "macvtapCni": {"config": [{"name": "old", "lowerDevice": "eth1"}]},
    "devicePlugin": {"route": "cdi"},
    "broker": {"enabled": True},
    "dra": {"enabled": True},
    "agent": {
        "env": [{"name": "GRPC_VERBOSITY", "value": "debug"}],
        "affinity": {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}
        },
        "podLabels": {"a": "b"},
        "podAnnotations": {"c": "d"},
        "maxUnavailable": "10%",
    },
    "metrics": {"address": "all", "port": 9999},
    "health": {"port": 9998},
    "monitoring": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "alerts": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True},
    },
}
SETTINGS: dict[str, Document] = {
    "as it comes": {},
    "kind": {"interfaces": [DATA]},
    "k3s": K3S,
    "openshift": OPENSHIFT,
    "monitoring": MONITORING,
    "dra": DRA,
    "loopback": {"metrics": {"address": "loopback"}},
    "everything": EVERYTHING,
}


def helm(command: str, *words: str | Path, values: Document | None = None) -> str:
    return manifests.run("helm", command, *words, "-f", "-", values=values or {})


def chart(values: Document | None = None, *, release: str = "vmtap") -> list[Document]:
    """What helm would send to the API server, hooks included."""
    return manifests.objects(helm("template", release, CHART, "--namespace", "vmtap-system", values=values))


def kustomize(path: str) -> list[Document]:
    return manifests.objects(manifests.run("kustomize", "build", KUSTOMIZE / path))


def of(objects: list[Document], kind: str, name: str = "vmtap") -> Document:
    [found] = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def bare(document: Document) -> Document:
    """Without what only helm writes, and with files as what is in them."""
    found = deepcopy(document)
    for metadata in (found["metadata"], found.get("spec", {}).get("template", {}).get("metadata", {})):
        for key in ("helm.sh/chart", "app.kubernetes.io/managed-by", "app.kubernetes.io/version"):
            metadata.get("labels", {}).pop(key, None)
        annotations = metadata.get("annotations", {})
        for key in [key for key in annotations if key.startswith(("helm.sh/", "checksum/"))]:
            del annotations[key]
        if not annotations:
            metadata.pop("annotations", None)
    if found["kind"] == "ConfigMap":
        found["data"] = {name: yaml.safe_load(text) for name, text in found["data"].items()}

    def sort(value: Any) -> None:
        """Lists that are maps by name or path: kustomize may change their order."""
        if isinstance(value, dict):
            for each in value.values():
                sort(each)
        elif isinstance(value, list):
            for each in value:
                sort(each)
            if value and all(isinstance(each, dict) for each in value):
                value.sort(key=lambda each: str(each.get("mountPath") or each.get("name") or ""))

    sort(found.get("spec", {}))
    return found


def by_name(objects: list[Document]) -> dict[tuple[str, str], Document]:
    return {
        (each["kind"], each["metadata"]["name"]): bare(each)
        for each in objects
        if each["kind"] != "Namespace"
    }


def is_hook(document: Document) -> bool:
    return "helm.sh/hook" in document["metadata"].get("annotations", {})


@pytest.mark.parametrize("name", SETTINGS)
def test_the_apis_understand_the_chart(name: str) -> None:
    for document in chart(SETTINGS[name]):
        assert manifests.faults(document) == [], document["metadata"]


@pytest.mark.parametrize("path", KUSTOMIZATIONS)
def test_the_apis_understand_the_kustomizations(path: str) -> None:
    for document in kustomize(path):
        assert manifests.faults(document) == [], document["metadata"]


EXAMPLES = sorted((DEPLOY / "examples/dra").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.name))
def test_the_apis_understand_the_examples_of_claims(path: Path) -> None:
    for document in manifests.objects(path.read_text()):
        assert manifests.faults(document) == []


def test_the_schemas_are_strict() -> None:
    """What is wrong is found: a misspelt field, a type, at any depth, and in a custom resource."""
    daemonset = of(kustomize("base"), "DaemonSet")
    container = daemonset["spec"]["template"]["spec"]["containers"][0]
    container["securityContext"]["readonlyRootFilesystem"] = True
    container["ports"][0]["containerPort"] = "9741"
    assert len(manifests.faults(daemonset)) == 2
    monitor = of(kustomize("monitoring"), "PodMonitor")
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "30s"
    [fault] = manifests.faults(monitor)
    assert "intervall" in fault
    assert manifests.faults({"apiVersion": "v2", "kind": "Pod"}) == ["no schema knows a Pod of v2"]


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("base", {}),
        ("overlays/kind", {"interfaces": [DATA]}),
        ("overlays/kind-broker", {"interfaces": [DATA], "broker": {"enabled": True}}),
        ("overlays/k3s", K3S),
        ("overlays/openshift", OPENSHIFT),
        ("overlays/dra", DRA),
    ],
)
def test_helm_and_kustomize_make_the_same(path: str, values: Document) -> None:
    same([each for each in chart(values) if not is_hook(each)], kustomize(path))


def same(helms: list[Document], kustomizes: list[Document]) -> None:
    by_helm, by_kustomize = by_name(helms), by_name(kustomizes)
    assert by_helm.keys() == by_kustomize.keys()
    for key, document in by_helm.items():
        assert document == by_kustomize[key]


@pytest.mark.parametrize(
    ("path", "components", "values"),
    [
        ("overlays/kind", ["dra"], {"interfaces": [DATA]}),
        ("overlays/k3s", ["dra"], K3S),
        ("overlays/openshift", ["dra"], OPENSHIFT),
        ("base", ["broker", "dra"], {"broker": {"enabled": True}}),
        ("base", ["dra", "broker"], {"broker": {"enabled": True}}),
    ],
)
def test_dra_beside_what_else_a_user_adds(
    tmp_path: Path, path: str, components: list[str], values: Document
) -> None:
    """In a kustomization of the user's own, as docs/kubernetes.md shows it."""
    where = os.path.relpath(KUSTOMIZE, tmp_path)
    own = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{where}/{path}"],
        "components": [f"{where}/{each}" for each in components],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own))
    made = manifests.objects(manifests.run("kustomize", "build", tmp_path))
    same([each for each in chart({**values, **DRA}) if not is_hook(each)], made)


@pytest.mark.parametrize("values", [{}, DRA], ids=["as it comes", "dra"])
def test_they_uninstall_the_same(values: Document) -> None:
    by_helm = by_name([each for each in chart(values) if is_hook(each)])
    for key, document in by_name(kustomize("uninstall")).items():
        assert document == by_helm[key]


def test_they_monitor_the_same() -> None:
    by_helm = by_name(chart(MONITORING))
    found = by_name(kustomize("monitoring"))
    assert {kind for kind, _ in found} == {"PodMonitor", "PrometheusRule"}
    for key, document in found.items():
        assert document == by_helm[key]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_agent_understands_its_files(name: str) -> None:
    data = of(chart(SETTINGS[name]), "ConfigMap")["data"]
    nodefile.parse("interfaces.yaml", data["interfaces.yaml"].encode(), schema.load("policy"))
    nodefile.parse("agent.yaml", data["agent.yaml"].encode(), schema.load("agent"))


@pytest.mark.parametrize("release", ["vmtap", "my-vmtap", "macvtap", 53 * "x"])
def test_names_are_names(release: str) -> None:
    objects = chart(EVERYTHING, release=release)
    label = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
    for document in objects:
        assert label.fullmatch(document["metadata"]["name"]), document["metadata"]["name"]
        assert manifests.faults(document) == []
    keys = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(keys) == len(set(keys))


def test_one_release_keeps_off_anothers_pods() -> None:
    spec = of(chart(release="vmtap"), "DaemonSet")["spec"]
    other = of(chart(release="vmtap-two"), "DaemonSet", "vmtap-two")["spec"]
    assert spec["selector"] != other["selector"]
    for each in (spec, other):
        assert each["selector"]["matchLabels"].items() <= each["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"interface": []}, "interface"),
        ({"agent": {"loglevel": "debug"}}, "loglevel"),
        ({"agent": {"logLevel": "loud"}}, "logLevel"),
        ({"interfaces": [{"name": "a"}]}, "source"),
        ({"interfaces": [{"name": "a", "source": {"dev": "a-name-that-is-too-long"}}]}, "dev"),
        ({"cni": {"binDir": "opt/cni/bin"}}, "binDir"),
        ({"metrics": {"port": 99999}}, "port"),
        ({"health": {"address": "node"}}, "address"),
        ({"devicePlugin": {"resourceNamespace": "Upper.Case"}}, "resourceNamespace"),
        ({"metrics": {"address": "loopback"}, **MONITORING}, "loopback"),
        ({"macPrefix": "01:00:5e"}, "macPrefix"),
    ],
)
def test_wrong_values_are_refused(values: Document, word: str) -> None:
    with pytest.raises(LabError, match=word):
        chart(values)


@pytest.mark.parametrize(
    "given",
    [
        {"macSeed": "5f0b", "macPrefix": "02:ab:cd"},
        {"mac": {"deny": ["52:54"], "derivedOnly": True}},
        {"ipamTypes": ["host-local"]},
        {"ipamTypes": []},
    ],
    ids=str,
)
def test_values_that_are_fields_of_the_policy(given: Document) -> None:
    policies = [
        yaml.safe_load(of(chart(values), "ConfigMap")["data"]["interfaces.yaml"]) for values in ({}, given)
    ]
    assert [{key: each.get(key) for key in given} for each in policies] == [dict.fromkeys(given), given]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["as it comes", "everything"])
def test_helm_has_nothing_to_say(values: Document) -> None:
    assert "[WARNING]" not in helm("lint", CHART, "--strict", values=values)


def test_only_a_change_of_the_agents_file_restarts_it() -> None:
    def stamp(values: Document) -> str:
        template = of(chart(values), "DaemonSet")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/agent"])

    assert stamp({}) == stamp({"interfaces": [DATA]})
    assert stamp({}) != stamp({"agent": {"logLevel": "debug"}})


@pytest.mark.parametrize(
    ("address", "metrics"),
    [
        ("node", "[$(NODE_ADDRESS)]:9741"),
        ("loopback", "127.0.0.1:9741"),
        ("all", ":9741"),
    ],
)
def test_probes_have_a_listener_of_their_own(address: str, metrics: str) -> None:
    objects = chart({"metrics": {"address": address}, "health": {"port": 9998}})
    agent = of(objects, "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
    settings = yaml.safe_load(of(objects, "ConfigMap")["data"]["agent.yaml"])
    assert settings["health"] == "127.0.0.1:9998"
    assert {each["name"]: each["containerPort"] for each in agent["ports"]} == {
        "metrics": 9741,
        "health": 9998,
    }
    assert {"name": "VMTAP_METRICS", "value": metrics} in agent["env"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert (agent[probe]["httpGet"]["port"], agent[probe]["httpGet"]["host"]) == ("health", "127.0.0.1")


def test_a_token_and_rights_only_for_claims() -> None:
    for values, wanted in (({}, set()), (DRA, {"agent"})):
        objects = chart(values)
        pod = of(objects, "DaemonSet")["spec"]["template"]["spec"]
        assert not pod["automountServiceAccountToken"]
        projected = [each["name"] for each in pod["volumes"] if "projected" in each]
        containers = [*pod["containers"], *pod["initContainers"]]
        having = {
            each["name"] for each in containers for at in each["volumeMounts"] if at["name"] in projected
        }
        assert having == wanted
        rights = [each for each in objects if each["kind"].startswith("ClusterRole") and not is_hook(each)]
        assert bool(rights) == bool(wanted)
        args = next(each for each in pod["containers"] if each["name"] == "agent")["args"]
        assert ("--dra" in args) == bool(wanted)


def test_privileged_only_for_the_broker() -> None:
    for values, privileged in (({}, False), ({"broker": {"enabled": True}}, True)):
        spec = of(chart(values), "DaemonSet")["spec"]["template"]["spec"]
        agent = spec["containers"][0]
        assert agent["securityContext"].get("privileged", False) == privileged
        assert spec.get("hostPID", False) == privileged
        if privileged:
            asked = re.findall(r"\+(\w+)", agent["command"][1])
            least = of(chart(), "DaemonSet")["spec"]["template"]["spec"]["containers"][0]["securityContext"]
            assert {word.upper() for word in asked} == {*least["capabilities"]["add"], "SYS_PTRACE"}


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, None),
        (OPENSHIFT, {"type": "spc_t"}),
        ({**OPENSHIFT, "agent": {"seLinuxOptions": {"type": "ours_t"}}}, {"type": "ours_t"}),
        ({"agent": {"seLinuxOptions": {"type": "spc_t"}}}, {"type": "spc_t"}),
    ],
)
def test_selinux(values: Document, options: Document | None) -> None:
    for name in ("vmtap", "vmtap-uninstall"):
        pod = of(chart(values), "DaemonSet", name)["spec"]["template"]["spec"]
        assert pod["securityContext"].get("seLinuxOptions") == options


def test_a_digest_goes_before_a_tag() -> None:
    digest = "sha256:" + 64 * "a"
    agent = of(chart({"image": {"digest": digest, "tag": "x"}}), "DaemonSet")["spec"]["template"]["spec"]
    assert {each["image"] for each in (*agent["containers"], *agent["initContainers"])} == {
        f"ghcr.io/vmtap/vmtap@{digest}"
    }


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({}, "No interface is named"),
        ({"interfaces": [DATA]}, "on eth0"),
        ({}, "vmtapctl doctor || status=1"),
        ({}, "Derived MACs have no seed"),  # helm template has no cluster whose UID it could look up
    ],
)
def test_what_the_user_is_told(tmp_path: Path, values: Document, word: str) -> None:
    """helm shows notes of what a cluster has taken; here they are a template as any other."""
    made = shutil.copytree(CHART, tmp_path / "vmtap")
    (made / "templates/NOTES.txt").rename(made / "notes")
    (made / "templates/notes.yaml").write_text('notes: |\n{{ tpl (.Files.Get "notes") . | indent 2 }}\n')
    text = helm("template", "vmtap", made, "--show-only", "templates/notes.yaml", values=values)
    notes = manifests.objects(text)[0]["notes"]
    assert word in notes
    assert "<no value>" not in notes
