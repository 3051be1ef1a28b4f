"""For doctor, list and tree: a NIC's virtual functions and the mode of its embedded switch. Only reads."""

from __future__ import annotations

from cni.kernel.rtnl import Rtnl
from cni.lower import sriov

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.config.policy import Interface
    from cni.ctl.inventory import Attachment, Node, Source

_HWMODES = {"bridge": "veb", "vepa": "vepa"}
"""Mode → bridge(8)'s word for it, hwmode."""


def faults(node: Node, source: Source, entry: Interface) -> Iterator[tuple[str, str, str]]:
    """Each fault as (severity, message, next step), of a source that exists, for an entry of type sr-iov."""
    assert entry.functions is not None  # noqa: S101 - the caller
    name, vfs = source.name, entry.functions.vfs
    if not source.most:
        yield (
            "error",
            f"interface {entry.name} is of type sr-iov, and it has no virtual functions",
            "switch SR-IOV on in its firmware and the machine's, name a PF, or make it of type ethernet",
        )
        return
    make = f"/sys/class/net/{name}/device/sriov_numvfs"
    if not source.functions and vfs is None:
        yield (
            "error",
            f"0 of {source.most} VFs are made, and {entry.name} does not set vfs",
            f"echo {min(source.most, 8)} > {make}, or set vfs in the policy",
        )
    elif not source.functions and vfs is not None and vfs > source.most:
        yield (
            "error",
            f"{entry.name} sets vfs: {vfs}, and the NIC can have {source.most} at most",
            "correct vfs in the policy",
        )
    for each in source.functions:
        if each.link is None and each.pci not in _attached(node):
            has = f"the driver {each.driver}" if each.driver else "no driver"
            yield (
                "warning",
                f"VF {each.number} has {has}, and no link on this host: no VM gets it",
                f"bind {each.pci} to the driver that makes a link of it, if VMs are to have it",
            )
    if entry.modes and "vepa" in entry.modes and source.switch_mode is None:
        yield (
            "warning",
            f"{entry.name} allows mode vepa, and the driver cannot set the mode of the embedded switch",
            "take vepa out of its modes: an ADD that asks for it is refused (7)",
        )
    for guest in node.on(name):
        mode = guest.record.mode or ""
        if guest.record.vf and source.switch_mode and mode in _HWMODES and source.switch_mode != mode:
            yield (
                "error",
                f"the embedded switch is in mode {source.switch_mode}, and {guest.record.ifname} of {guest.sandbox} "
                f"needs {mode}",
                f"bridge link set dev {name} hwmode {_HWMODES[mode]}",
            )
            break


def summary(node: Node, source: Source) -> str:
    """ "2 of 7 VFs made, 1 free, embedded switch in mode bridge"."""
    attached = _attached(node)
    free = sum(each.link is not None and each.pci not in attached for each in source.functions)
    mode = f"in mode {source.switch_mode}" if source.switch_mode else "without a mode to set"
    return f"{len(source.functions)} of {source.most} VFs made, {free} free, embedded switch {mode}"


def changes(each: Attachment) -> Iterator[tuple[str, str, str]]:
    """Each change of an attachment's VF since ADD, as (severity, message, next step)."""
    with Rtnl() as host:
        for what in sriov.changes(host, each.record.vf) if each.record.vf else ():
            step = "set it back by ip link set PF vf N, or delete the pod: CHECK fails of it"
            yield "warning", f"its {each.function} of {each.record.source}: {what}", step


def _attached(node: Node) -> set[str]:
    """The PCI addresses of the VFs that attachments have."""
    return {each.record.vf.pci for each in node.attachments if each.record.vf}
