"""Finds what is vmtap's in Kubernetes manifests: network configs in NetworkAttachmentDefinitions, files of the node in
ConfigMaps, and the parameters of resource claims and their classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from cni.config.claim import DRIVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

RESOURCE = "k8s.v1.cni.cncf.io/resourceName"
"""The annotation by which Multus passes on the device that the kubelet has allocated from a resource."""


_CONFIGS = {
    "DeviceClass": ("spec",),
    "ResourceClaim": ("spec", "devices"),
    "ResourceClaimTemplate": ("spec", "spec", "devices"),
}
"""Kind → the field whose list config may have parameters (resource.k8s.io/v1)."""


@dataclass(frozen=True)
class Part:
    """A text in a manifest. where: its place, for a person."""

    where: str
    text: Any
    """A string, if the manifest is valid."""
    network: str | None = None
    """The name of the NetworkAttachmentDefinition, whose text is a network config; None: a ConfigMap's entry."""
    resource: str | None = None
    """The resource from which pods get their devices for the network."""


def is_one(document: object) -> bool:
    """Whether the document is an object of Kubernetes, or a list of them."""
    return isinstance(document, dict) and {"apiVersion", "kind"} <= document.keys()


def objects(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The object, or the objects of a list (kubectl get -o yaml)."""
    kind = document["kind"]
    if isinstance(kind, str) and kind.endswith("List"):
        for item in _list(document.get("items")):
            if is_one(item):
                yield from objects(item)
    else:
        yield document


def parameters(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(place, parameters) of each config for the driver in a DeviceClass, ResourceClaim or ResourceClaimTemplate."""
    steps = _CONFIGS.get(str(document["kind"]))
    if steps is None:
        return
    holder = document
    for step in steps:
        holder = _object(holder.get(step))
    for number, each in enumerate(_list(holder.get("config"))):
        opaque = _object(_object(each).get("opaque"))
        if opaque.get("driver") == DRIVER:
            place = ".".join((*steps, f"config[{number}].opaque.parameters"))
            yield f"{_name(document)}: {place}", opaque.get("parameters")


def parts(document: dict[str, Any]) -> Iterator[Part]:
    """The texts in the object."""
    kind = document["kind"]
    metadata = _object(document.get("metadata"))
    where = _name(document)
    if kind == "NetworkAttachmentDefinition":
        spec = _object(document.get("spec"))
        resource = _object(metadata.get("annotations")).get(RESOURCE)
        if spec.get("config") not in (None, ""):  # else Multus takes the config from the node's files
            name = str(metadata.get("name") or "")
            yield Part(f"{where}: spec.config", spec["config"], name, str(resource) if resource else None)
    elif kind == "ConfigMap":
        for key, text in _object(document.get("data")).items():
            yield Part(f"{where}: data.{key}", text)


def _name(document: dict[str, Any]) -> str:
    metadata = _object(document.get("metadata"))
    names = (str(metadata[key]) for key in ("namespace", "name") if metadata.get(key))
    return f"{document['kind']} {'/'.join(names)}"


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
