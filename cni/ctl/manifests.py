"""Finds network configs and files of the node in Kubernetes manifests: NetworkAttachmentDefinitions and ConfigMaps."""

from __future__ import annotations

from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

RESOURCE = "k8s.v1.cni.cncf.io/resourceName"
"""The annotation by which Multus passes on the device that the kubelet has allocated from a resource."""


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


def parts(document: dict[str, Any]) -> Iterator[Part]:
    """The texts in the object, or in the objects of a list (kubectl get -o yaml)."""
    kind = document["kind"]
    if isinstance(kind, str) and kind.endswith("List"):
        for item in _list(document.get("items")):
            if is_one(item):
                yield from parts(item)
        return
    metadata = _object(document.get("metadata"))
    where = f"{kind} {'/'.join(str(metadata[key]) for key in ('namespace', 'name') if metadata.get(key))}"
    if kind == "NetworkAttachmentDefinition":
        spec = _object(document.get("spec"))
        resource = _object(metadata.get("annotations")).get(RESOURCE)
        if spec.get("config") not in (None, ""):  # else Multus takes the config from the node's files
            name = str(metadata.get("name") or "")
            yield Part(f"{where}: spec.config", spec["config"], name, str(resource) if resource else None)
    elif kind == "ConfigMap":
        for key, text in _object(document.get("data")).items():
            yield Part(f"{where}: data.{key}", text)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
