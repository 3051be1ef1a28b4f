"""The name of a KubeVirt launcher pod. ADD of a pod imports this file."""

from __future__ import annotations

_PREFIX = "virt-launcher-"
_SUFFIX = 5  # characters that the API server appends to a generateName


def vm(pod: str) -> str | None:
    """The VM of the launcher pod virt-launcher-<vm>-xxxxx; None if the pod's name is not of that form."""
    name, _, suffix = pod.removeprefix(_PREFIX).rpartition("-")
    return name if pod.startswith(_PREFIX) and name and len(suffix) == _SUFFIX else None
