"""deploy/kubevirt: KubeVirt knows every field, the plugin accepts every network, and the parts fit each other.

KubeVirt's types are tested with objects in which every field is set; what is not in those is no field. What they
cannot say is which values a field may have, and what a webhook of KubeVirt would refuse.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cni.config import netconf, policy
from lab.assets.programs import KUBEVIRT
from tests.kubevirt.conftest import DEPLOY, LauncherPod

if TYPE_CHECKING:
    from pathlib import Path

    from lab.wire import Lab
    from tests.runner import Plugin

FOLDER = DEPLOY / "kubevirt"
EXAMPLES = ("macvtap.yaml", "tap-bridge.yaml", "tap-plain.yaml")
RESOURCE = "k8s.v1.cni.cncf.io/resourceName"
RESOURCE_NAMESPACE = "macvtap.network.kubevirt.io"
"""The device plugin's default."""


def documents(name: str, kind: str = "") -> list[dict[str, Any]]:
    """What is in the file, of that kind."""
    each: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / name).read_text()))
    return [document for document in each if kind in ("", document["kind"])]


def networks(name: str) -> dict[str, dict[str, Any]]:
    """The network configs of the file's definitions by name, with a deviceID as Multus puts it in."""
    found = {}
    for each in documents(name, "NetworkAttachmentDefinition"):
        config = json.loads(each["spec"]["config"])
        if resource := each["metadata"].get("annotations", {}).get(RESOURCE):
            config["deviceID"] = f"{resource.rpartition('/')[2]}Mvp0"
        found[each["metadata"]["name"]] = config
    return found


def attachments(machine: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(interface, network) of each of the VM's NICs."""
    spec = machine["spec"]["template"]["spec"]
    by_name = {network["name"]: network for network in spec["networks"]}
    return [(each, by_name[each["name"]]) for each in spec["domain"]["devices"]["interfaces"]]


def test_every_file_is_looked_at() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted([*EXAMPLES, "binding.yaml"])


@pytest.mark.parametrize("version", KUBEVIRT)
@pytest.mark.parametrize("name", [*EXAMPLES, "binding.yaml"])
def test_kubevirt_knows_every_field(name: str, version: str) -> None:
    folder = KUBEVIRT[version].get()
    for document in documents(name):
        if document["apiVersion"] == "kubevirt.io/v1":
            shape = json.loads((folder / f"kubevirt.io.v1.{document['kind']}.json").read_text())
            assert strangers(document, shape) == []
        else:
            assert (document["apiVersion"], document["kind"]) == (
                "k8s.cni.cncf.io/v1",
                "NetworkAttachmentDefinition",
            )


def test_a_misspelt_field_is_noticed() -> None:
    shape = json.loads((KUBEVIRT["v1.5.0"].get() / "kubevirt.io.v1.VirtualMachine.json").read_text())
    (machine, *_) = documents("macvtap.yaml", "VirtualMachine")
    domain = machine["spec"]["template"]["spec"]["domain"]
    domain["devices"]["networkInterfaceMultiQueue"] = True
    domain["cpu"]["cores"] = "2"
    assert strangers(machine, shape) == [
        ".spec.template.spec.domain.cpu.cores",
        ".spec.template.spec.domain.devices.networkInterfaceMultiQueue",
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_vm_uses_what_is_defined(name: str) -> None:
    (kubevirt,) = documents("binding.yaml")
    bindings = kubevirt["spec"]["configuration"]["network"]["binding"]
    configs = networks(name)
    used = set()
    for machine in documents(name, "VirtualMachine"):
        domain = machine["spec"]["template"]["spec"]["domain"]
        processors = domain.get("cpu", {}).get("cores", 1)
        several = domain["devices"].get("networkInterfaceMultiqueue", False) and processors > 1
        for interface, network in attachments(machine):
            assert interface["binding"]["name"] in bindings
            config = configs[network["multus"]["networkName"]]
            used.add(config["name"])
            if config.get("device") == "tap":  # its flag and libvirt's have to be the same
                assert (config.get("queues", 1) > 1) == several
    assert used == set(configs)
    assert list(configs) == [config["name"] for config in configs.values()]


def test_the_page_and_the_example_have_one_network() -> None:
    """docs/kubevirt.md applies both, one after the other."""
    blocks = (DEPLOY.parent / "docs/kubevirt.md").read_text().split("```yaml\n")[1:]
    (shown,) = [block.split("```")[0] for block in blocks if "kind: NetworkAttachmentDefinition" in block]
    page, (example,) = yaml.safe_load(shown), documents("macvtap.yaml", "NetworkAttachmentDefinition")
    for each in (page, example):
        each["spec"]["config"] = json.loads(each["spec"]["config"])
    assert page == example


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_plugin_accepts_each_network(name: str) -> None:
    granted = policy.load(DEPLOY / "examples/interfaces.yaml")
    for each in documents(name, "NetworkAttachmentDefinition"):
        config = networks(name)[each["metadata"]["name"]]
        grant = policy.authorize(granted, netconf.parse(json.dumps(config).encode()))
        resource = each["metadata"].get("annotations", {}).get(RESOURCE)
        assert resource in (None, f"{RESOURCE_NAMESPACE}/{grant.interface}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_vm_gets_its_link(lab: Lab, plugin: Plugin, reference_plugins: Path, name: str) -> None:
    plugin = replace(plugin, cni_path=str(reference_plugins))
    configs = networks(name)
    for number, machine in enumerate(documents(name, "VirtualMachine")):
        vm = machine["metadata"]["name"]
        pod = LauncherPod(plugin, lab.pod(vm), vm=vm)
        for interface, network in attachments(machine):
            config = dict(configs[network["multus"]["networkName"]])
            if "deviceID" in config:
                config["deviceID"] = config["deviceID"][:-1] + str(number)
            mac = interface.get("macAddress")
            result = pod.add(interface["name"], mac=mac, **config)
            link = pod.link(interface["name"])
            assert link["linkinfo"]["info_kind"] == ("tun" if config.get("device") == "tap" else "macvtap")
            assert mac in (None, result["interfaces"][0]["mac"])


def strangers(document: Any, shape: Any, path: str = "") -> list[str]:
    """The fields of a document that are not, or not of that type, in an object that has all there are."""
    if isinstance(document, dict) and isinstance(shape, dict):
        found = []
        for key, value in document.items():
            # A map of names that anybody may choose has one, which ends so.
            known = shape.get(key, next((each for name, each in shape.items() if name.endswith("Key")), None))
            found += [f"{path}.{key}"] if known is None else strangers(value, known, f"{path}.{key}")
        return found
    if isinstance(document, list) and isinstance(shape, list):
        return [each for item in document for each in strangers(item, shape[0], f"{path}[]")]
    return [] if type(document) is type(shape) else [path]
