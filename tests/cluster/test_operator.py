"""What an operator does with a cluster: applies the kustomizations, asks what is wrong, and leaves the old plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from lab.kubernetes import manifests
from lab.process import LabError
from lab.wire import NIC
from tests.cluster.conftest import CAPACITY, CHART, NAMESPACE, RESOURCES, network, pod

if TYPE_CHECKING:
    from tests.cluster.conftest import Release

KUSTOMIZE = Path(__file__).parents[2] / "deploy/kustomize"


@pytest.mark.parametrize("path", ["base", "overlays/kind", "overlays/k3s", "uninstall"])
def test_the_api_server_takes_the_kustomizations(release: Release, path: str) -> None:
    """All of its own checks, and none of the objects is kept."""
    text = manifests.run("kustomize", "build", KUSTOMIZE / path)
    for each in manifests.objects(text):
        each["metadata"]["name"] += "-tried"  # what helm has made is another's
        said = release.cluster.kubectl(
            *("create", "--dry-run=server", "--validate=strict", "-f", "-"), stdin=json.dumps(each)
        )
        assert "created (server dry run)" in said
        assert "Warning" not in said


def test_the_api_server_takes_what_helm_runs_at_the_end(release: Release) -> None:
    text = manifests.run("helm", "template", "tried-vmtap", CHART, "--namespace", NAMESPACE)
    said = release.cluster.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
    assert said.count("created (server dry run)") == len(manifests.objects(text))


def test_the_seed_of_macs_is_the_clusters(release: Release) -> None:
    """helm looks up the UID of kube-system."""
    files = release.cluster.get("-n", NAMESPACE, "configmap", "vmtap")["data"]
    uid = release.cluster.get("namespace", "kube-system")["metadata"]["uid"]
    assert yaml.safe_load(files["interfaces.yaml"])["macSeed"] == uid


def test_who_may_not_look_the_seed_up_sets_it(release: Release) -> None:
    words = ("helm", "template", "tried", str(CHART), "--dry-run=server", "--kube-as-user", "nobody")
    with pytest.raises(LabError, match='namespaces "kube-system" is forbidden'):
        release.cluster.run([*words])
    assert 'macSeed: "mine"' in release.cluster.run([*words, "--set", "macSeed=mine"])


def test_doctor_finds_nothing_wrong(release: Release) -> None:
    """But vhost, which is the test machine's, and a warning: kubectl exits with doctor's status, 0."""
    release.wait_resource("dataplane", CAPACITY)  # a test before this one has started the kubelet anew
    doctor = ("exec", "daemonset/vmtap", "-c", "agent", "--", "vmtapctl", "doctor", "--json")
    said = release.cluster.kubectl("-n", NAMESPACE, *doctor)
    found = json.loads(said)["findings"]
    assert [each for each in found if each["severity"] != "ok" and each["check"] != "vhost"] == []
    assert {"agent", "device plugin", "source eth1"} <= {each["check"] for each in found}


def test_the_old_plugins_config_and_networks_stay_as_they_are(release: Release) -> None:
    """kubevirt/macvtap-cni's ConfigMap and a NetworkAttachmentDefinition of its type."""
    before = release.traces()
    config = [{"name": "old", "lowerDevice": NIC, "mode": "bridge", "capacity": 2}]
    release.cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "macvtap-deviceplugin-config", "namespace": NAMESPACE},
            "data": {"DP_MACVTAP_CONF": json.dumps(config)},
        },
        network("old", cniVersion="0.3.1", type="macvtap", mtu=1400),
    )
    release.restart()
    release.wait_resource("old", 2)
    release.cluster.apply(pod("migrated", "old"))
    release.cluster.wait("pod/migrated", "condition=Ready")
    [record] = release.records()
    assert (record["interface"], record["mode"], record["mtu"]) == ("old", "bridge", 1400)
    container = release.cluster.get("pod", "migrated")["spec"]["containers"][0]
    assert container["resources"]["limits"] == {f"{RESOURCES}/old": "1"}
    release.cluster.kubectl("delete", "pod", "migrated", "--wait")
    release.kubectl("delete", "configmap", "macvtap-deviceplugin-config")
    release.cluster.kubectl("delete", "network-attachment-definition", "old")
    release.restart()
    release.wait_resource("old", 0)
    release.left(before)
