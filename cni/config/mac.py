"""The MAC address of a guest to which nobody gives one. Pure."""

from __future__ import annotations

from _blake2 import blake2s  # as in lock.py

from cni.config import launcher_pod

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def derive(network: str, container_id: str, ifname: str, args: Mapping[str, str]) -> str:
    """A locally administered unicast address from what survives the pod.

    That is the network, the Kubernetes namespace, the VM's name (a KubeVirt launcher pod is
    virt-launcher-<vm>-xxxxx) or else the pod's, and the interface: a restarted VM, or one that migrates to
    another node, keeps its address. Outside Kubernetes (no K8S_POD_NAME in CNI_ARGS) the container's id
    stands for the pod.
    """
    pod = args.get("K8S_POD_NAME", "")
    namespace = args.get("K8S_POD_NAMESPACE", "")
    if vm := launcher_pod.vm(pod):
        owner = ("vm", namespace, vm)
    elif pod:
        owner = ("pod", namespace, pod)
    else:
        owner = ("container", container_id, "")
    digest = bytearray(blake2s("\0".join((network, *owner, ifname)).encode(), digest_size=6).digest())
    digest[0] = digest[0] & 0xFC | 0x02
    return digest.hex(":")


def of_plain_tap(guest: str) -> str:
    """The tap's own address, which must differ from the guest's: the two are ends of one wire."""
    return ("fa" if guest.startswith("fe") else "fe") + guest[2:]
