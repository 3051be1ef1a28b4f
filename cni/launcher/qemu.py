"""Builds the QEMU command line from attachments and options. Pure: no I/O.

The fds have the numbers that privilege.place() gives them, in this order: for each attachment its queues, then its
vhost fds; the seed; the monitor. So --print shows the command that would run.

The launcher's arguments follow the user's, because QEMU assigns PCI slots in the order of its arguments: a slot that
the user assigns explicitly is still free.
"""

from __future__ import annotations

from itertools import count, islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cni.launcher.broker_client import Described

FIRST_FD = 3
"""The number of QEMU's first fd, after stdin, stdout and stderr."""


def command(
    qemu_argv: Sequence[str],
    attachments: Sequence[tuple[Described, int]],
    *,
    vhost: bool = False,
    seeded: bool = False,
    supervised: bool = False,
    sandboxed: bool = False,
) -> list[str]:
    """The whole command. qemu_argv: program and the user's arguments; attachments: each with its number of queues."""
    numbers = count(FIRST_FD)
    arguments = list(qemu_argv)
    for index, (record, queues) in enumerate(attachments):
        fds = list(islice(numbers, queues))
        vhost_fds = list(islice(numbers, queues if vhost else 0))
        arguments += network(f"vmtap{index}", record, fds, vhost_fds)
    if seeded:
        arguments += seed(next(numbers))
    if supervised:
        arguments += monitor(next(numbers))
    if sandboxed and not {"-sandbox", "--sandbox"} & set(qemu_argv):
        arguments += ["-sandbox", "on"]
    return arguments


def network(name: str, record: Described, fds: Sequence[int], vhost_fds: Sequence[int]) -> list[str]:
    """-netdev and -device of one attachment. fds: one for each queue; vhost_fds: as many, or none."""
    backend: dict[str, object] = {"id": name, "fds": ":".join(map(str, fds))}
    if vhost_fds:
        backend |= {"vhost": "on", "vhostfds": ":".join(map(str, vhost_fds))}
    card: dict[str, object] = {"netdev": name, "mac": record.mac, "host_mtu": record.mtu}
    if len(fds) > 1:
        # One interrupt for each direction of each queue, one for control, one for config changes.
        card |= {"mq": "on", "vectors": 2 * len(fds) + 2}
    return ["-netdev", option("tap", backend), "-device", option("virtio-net-pci", card)]


def seed(fd: int) -> list[str]:
    """The NoCloud seed as a CD-ROM. QEMU opens it by /dev/fdset, because the image is a memfd.

    Not a disk: a BIOS boots only from the first disk, and the seed must not be that one. On virtio-scsi, because few
    machine types have IDE and cloud kernels lack its driver.
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
    """QMP on a connected socket, for --supervise."""
    chardev = option("socket", {"id": "vmtap-qmp", "fd": fd, "server": "off"})
    return ["-chardev", chardev, "-mon", option(None, {"chardev": "vmtap-qmp", "mode": "control"})]


def option(kind: str | None, values: Mapping[str, object]) -> str:
    """An option value "kind,key=value,…"; a comma within a value is doubled (qemu(1), "-drive")."""
    parts = [f"{key}={value}".replace(",", ",,") for key, value in values.items()]
    return ",".join(parts if kind is None else [kind, *parts])
