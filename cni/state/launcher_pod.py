"""The VM's name in the name of a KubeVirt launcher's pod. Pure.

The API server names the pod virt-launcher-VM-xxxxx: it appends five characters to the generateName virt-launcher-VM-,
which it cuts to 58 characters before (k8s.io/apiserver, pkg/storage/names).
"""

from __future__ import annotations

_PREFIX = "virt-launcher-"
_SUFFIX = 5
_LONGEST = 63


def vm_name(pod: str) -> str | None:
    """The name of the pod's VM, of which a long one is cut to 44 characters; None if the pod is no launcher's."""
    stem, suffix = pod[:-_SUFFIX], pod[-_SUFFIX:]
    name = stem.removeprefix(_PREFIX)
    generated = suffix.isascii() and suffix.isalnum() and suffix == suffix.lower()
    if name == stem or not generated or not (name.endswith("-") or len(pod) == _LONGEST):
        return None
    return name.removesuffix("-") or None
