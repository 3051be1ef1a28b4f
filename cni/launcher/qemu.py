"""The QEMU command line, from attachments and options. Pure: opens, reads and asks nothing.

The fds have the numbers that `privilege.place` gives them, in this order: for each attachment its queues,
then its vhost fds; the seed; the monitor. So a command that is only printed is the one that would run.

Ours follows the user's own arguments, because QEMU gives out PCI slots in the order of its arguments: a
device that the user puts at an address finds it free.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cni.state import Record

FIRST_FD = 3
"""QEMU's fds begin after stdin, stdout and stderr."""


@dataclass(frozen=True)
class Nic:
    """One attachment as the guest is to see it: one fd, and one vhost fd or none, for each queue."""

    mac: str
    mtu: int
    fds: tuple[int, ...]
    vhost_fds: tuple[int, ...] = ()


def command(
    users: Sequence[str],
    attachments: Sequence[tuple[Record, int]],
    *,
    vhost: bool = False,
    seeded: bool = False,
    supervised: bool = False,
) -> list[str]:
    """users: the program and its own arguments. attachments: each with the number of queues to open."""
    numbers = count(FIRST_FD)
    nics = [
        Nic(
            mac=record.mac,
            mtu=record.mtu,
            fds=tuple(islice(numbers, queues)),
            vhost_fds=tuple(islice(numbers, queues if vhost else 0)),
        )
        for record, queues in attachments
    ]
    return [
        *users,
        *network(nics),
        *(seed(next(numbers)) if seeded else []),
        *(monitor(next(numbers)) if supervised else []),
    ]


def option(kind: str | None, values: Mapping[str, object]) -> str:
    """One value of QEMU's "kind,key=value,…" form; a comma inside a value is doubled (qemu(1), "-drive")."""
    parts = [f"{key}={value}".replace(",", ",,") for key, value in values.items()]
    return ",".join(parts if kind is None else [kind, *parts])


def network(nics: Sequence[Nic]) -> list[str]:
    """A back end and a card for each attachment. vhostfds and fds are of the same length, as QEMU demands."""
    arguments = []
    for index, nic in enumerate(nics):
        backend: dict[str, object] = {"id": f"vmtap{index}", "fds": _numbers(nic.fds)}
        if nic.vhost_fds:
            backend |= {"vhost": "on", "vhostfds": _numbers(nic.vhost_fds)}
        card: dict[str, object] = {"netdev": f"vmtap{index}", "mac": nic.mac, "host_mtu": nic.mtu}
        if len(nic.fds) > 1:
            # An interrupt for each queue's two directions, one for control, one for config changes.
            card |= {"mq": "on", "vectors": 2 * len(nic.fds) + 2}
        arguments += ["-netdev", option("tap", backend), "-device", option("virtio-net-pci", card)]
    return arguments


def seed(fd: int) -> list[str]:
    """The NoCloud seed as a CD-ROM. QEMU opens it through /dev/fdset, as it has no file to open.

    A CD-ROM and not a disk: a BIOS tries only the first of the disks, and the seed must not become that one.
    On virtio-scsi: few machine types have IDE, and cloud kernels leave its driver out.
    """
    name = "vmtap-seed"
    node = {"driver": "raw", "node-name": name, "read-only": "on"}
    file = {"file.driver": "file", "file.filename": f"/dev/fdset/{fd}"}
    return [
        *("-add-fd", option(None, {"fd": fd, "set": fd, "opaque": name})),
        *("-blockdev", option(None, node | file)),
        *("-device", option("virtio-scsi-pci", {"id": "vmtap-scsi"})),
        *("-device", option("scsi-cd", {"bus": "vmtap-scsi.0", "drive": name})),
    ]


def monitor(fd: int) -> list[str]:
    """QMP on a connected socket, for the launcher that stays as parent."""
    chardev = option("socket", {"id": "vmtap-qmp", "fd": fd, "server": "off"})
    return ["-chardev", chardev, "-mon", option(None, {"chardev": "vmtap-qmp", "mode": "control"})]


def _numbers(fds: Sequence[int]) -> str:
    return ":".join(map(str, fds))
