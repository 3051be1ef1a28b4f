"""The QEMU command line, from attachments and options. Pure: opens, reads and asks nothing.

The fds have the numbers that `privilege.place` gives them, in this order: for each attachment its queues,
then its vhost fds; the seed; the monitor. So a command that is only printed is the one that would run.

Ours follows the user's own arguments, because QEMU gives out PCI slots in the order of its arguments: a
device that the user puts at an address finds it free.
"""

from __future__ import annotations

from itertools import count, islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cni.launcher.broker_client import Described

FIRST_FD = 3
"""QEMU's fds begin after stdin, stdout and stderr."""


def command(
    users: Sequence[str],
    attachments: Sequence[tuple[Described, int]],
    *,
    vhost: bool = False,
    seeded: bool = False,
    supervised: bool = False,
) -> list[str]:
    """users: the program and its own arguments. attachments: each with the number of queues to open."""
    numbers = count(FIRST_FD)
    arguments = list(users)
    for index, (record, queues) in enumerate(attachments):
        fds = list(islice(numbers, queues))
        vhost_fds = list(islice(numbers, queues if vhost else 0))
        arguments += network(f"vmtap{index}", record, fds, vhost_fds)
    if seeded:
        arguments += seed(next(numbers))
    if supervised:
        arguments += monitor(next(numbers))
    return arguments


def network(name: str, record: Described, fds: Sequence[int], vhost_fds: Sequence[int]) -> list[str]:
    """A back end and a card. One fd for each queue; as many vhost fds, or none."""
    backend: dict[str, object] = {"id": name, "fds": ":".join(map(str, fds))}
    if vhost_fds:
        backend |= {"vhost": "on", "vhostfds": ":".join(map(str, vhost_fds))}
    card: dict[str, object] = {"netdev": name, "mac": record.mac, "host_mtu": record.mtu}
    if len(fds) > 1:
        # An interrupt for each queue's two directions, one for control, one for config changes.
        card |= {"mq": "on", "vectors": 2 * len(fds) + 2}
    return ["-netdev", option("tap", backend), "-device", option("virtio-net-pci", card)]


def seed(fd: int) -> list[str]:
    """The NoCloud seed as a CD-ROM. QEMU opens it through /dev/fdset, as it has no file to open.

    A CD-ROM and not a disk: a BIOS tries only the first of the disks, and the seed must not become that one.
    On virtio-scsi: few machine types have IDE, and cloud kernels leave its driver out.
    """
    name = "vmtap-seed"
    node = {"driver": "raw", "node-name": name, "read-only": "on"}
    file = {"file.driver": "file", "file.filename": f"/dev/fdset/{fd}"}
    return [
        *("-add-fd", option(None, {"fd": fd, "set": fd})),
        *("-blockdev", option(None, node | file)),
        *("-device", option("virtio-scsi-pci", {"id": "vmtap-scsi"})),
        *("-device", option("scsi-cd", {"bus": "vmtap-scsi.0", "drive": name})),
    ]


def monitor(fd: int) -> list[str]:
    """QMP on a connected socket, for the launcher that stays as parent."""
    chardev = option("socket", {"id": "vmtap-qmp", "fd": fd, "server": "off"})
    return ["-chardev", chardev, "-mon", option(None, {"chardev": "vmtap-qmp", "mode": "control"})]


def option(kind: str | None, values: Mapping[str, object]) -> str:
    """One value of QEMU's "kind,key=value,…" form; a comma inside a value is doubled (qemu(1), "-drive")."""
    parts = [f"{key}={value}".replace(",", ",,") for key, value in values.items()]
    return ",".join(parts if kind is None else [kind, *parts])
