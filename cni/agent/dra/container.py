"""What the hook must know of a container: its pod, its network namespace and its device nodes.

Source: config.json of the OCI runtime specification, and the annotations that containerd and CRI-O set in it.
"""

from __future__ import annotations

import json

from cni.dataclass import dataclass
from cni.errors import CniError, reason
from cni.names import printable
from cni.spec import DECODING_FAILURE, WRONG_DEVICE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_POD_UID = ("io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid")
"""containerd's annotation, and CRI-O's. A pod's author may be able to add the other runtime's: so all count."""


@dataclass(frozen=True)
class Container:
    """A container that is created and not started."""

    pods: frozenset[str]
    """The UIDs of the pod, by each annotation that has one: one UID, unless somebody has forged another."""
    netns: str
    """The path of its network namespace in config.json."""
    devices: Mapping[str, tuple[int, int]]
    """(major, minor) of its device nodes, by their path in it."""

    @property
    def pod(self) -> str:
        """The UID of the pod."""
        return min(self.pods, default="")

    @staticmethod
    def read(text: bytes) -> Container:
        """The container of a config.json. Raises CniError 6 if it is none."""
        try:
            document = json.loads(text)
            annotations, linux = document.get("annotations") or {}, document["linux"]
            pods = frozenset(str(annotations[each]) for each in _POD_UID if annotations.get(each))
            paths = [str(each.get("path", "")) for each in linux["namespaces"] if each["type"] == "network"]
            devices = {str(each["path"]): _number(each) for each in linux.get("devices") or ()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CniError(
                DECODING_FAILURE, "the container's config.json cannot be read", reason(error)
            ) from None
        path = paths[0] if paths else ""
        return Container(pods, path if printable(path) else "", devices)

    def check(self, path: str, device: tuple[int, int]) -> None:
        """Raises CniError 107 if the container has a node at path that is of another device than (major, minor)."""
        found = self.devices.get(path, device)
        if found != device:
            its, ours = ("{}:{}".format(*each) for each in (found, device))
            raise CniError(
                WRONG_DEVICE,
                f"the container was created with device {its} at {path}, and the claim's link has {ours}: "
                "create the container again",
            )


def _number(device: Mapping[str, Any]) -> tuple[int, int]:
    major, minor = device.get("major", 0), device.get("minor", 0)
    if not (isinstance(major, int) and isinstance(minor, int)):
        raise TypeError("a device's major or minor is no number")
    return major, minor
