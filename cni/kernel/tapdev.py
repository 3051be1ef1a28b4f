"""From a link to its verified character device and open fds (drivers/net/tap.c, macvtap.c, tun.c).

/dev/tapN is never opened by its name. N is the link's index in its own network namespace, and the host has one /dev:
two pods whose links have one index share the name. What is opened here is proven to be the link's:

1. the link's index is read from a sysfs of its network namespace, and must be the attachment's;
2. major:minor of its character device are read there; a node of that number is made on a detached tmpfs, and opened;
3. the sysfs is read again: the link still has that index and number while the fd is open;
4. TUNGETIFF succeeds on the fd, so the fd's link is alive now, and was at 3. No two live links have one number, so it
   is the attachment's link. Its name and MAC are compared as well.

A process that is killed leaves no node, mount or queue behind: the mounts end with their fd.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from contextlib import ExitStack, suppress
from fcntl import ioctl

from cni.dataclass import replace
from cni.errors import CniError, reason
from cni.kernel import mount, netns, sysfs
from cni.spec import DEVICE_BUSY, IO_FAILURE, NO_ATTACHMENT, WRONG_DEVICE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.kernel.sysfs import Sysfs
    from cni.state.record import Record

TUN = (10, 200)  # /dev/net/tun, Documentation/admin-guide/devices.txt

TUNSETIFF = 0x400454CA
TUNGETIFF = 0x800454D2
SIOCGIFHWADDR = 0x8927

IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_PERSIST = 0x0800
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000


def open_queues(pod_netns: int, record: Record, queues: int) -> list[int]:
    """Open queues of the attachment. Returns fds, O_RDWR | O_CLOEXEC | O_NONBLOCK; the caller closes them.

    Each open of a macvtap adds a queue that receives a share of the frames, so open only what will be read. Raises
    CniError 105 (the link is gone), 106 (other queues are open) or 107 (the link is not the one that ADD made).
    """
    opener = _open_macvtap if record.device == "macvtap" else _open_tap
    with ExitStack() as fds:
        with sysfs.mounted(pod_netns) as links:
            opened = []
            for _ in range(queues):
                opened.append(opener(links, pod_netns, record))
                fds.callback(os.close, opened[-1])
        fds.pop_all()
        return opened


def tuned(pod_netns: int, record: Record) -> Record | None:
    """The record with the MTU, and for a macvtap the MAC, that the link has now; None if the link is gone.

    A later plugin of the chain (tuning) may have changed them. A macvtap receives the frames for its own MAC, so the
    guest must have that one; a tap's own MAC is not the guest's.
    """
    with sysfs.mounted(pod_netns) as links, suppress(FileNotFoundError):
        if int(links.attribute(f"{record.ifname}/ifindex")) == record.ifindex:
            mac = links.attribute(f"{record.ifname}/address") if record.device == "macvtap" else record.mac
            return replace(record, mac=mac, mtu=int(links.attribute(f"{record.ifname}/mtu")))
    return None


def number(pod_netns: int, ifname: str) -> tuple[int, int, int]:
    """(ifindex, major, minor) of the macvtap of that name in the network namespace. Raises CniError 105 without it."""
    with sysfs.mounted(pod_netns) as links:
        return _number(links, ifname)


def open_node(device: tuple[int, int], pod_netns: int | None = None) -> int:
    """Open the character device (major, minor) by a node of its own. Returns an fd; the caller closes it.

    pod_netns: an fd of the network namespace to open it in, or None. Raises OSError, CniError 5.
    """
    with ExitStack() as stack:
        folder = mount.detached(b"tmpfs")
        stack.callback(os.close, folder)
        os.mknod("node", stat.S_IFCHR | 0o600, os.makedev(*device), dir_fd=folder)
        if pod_netns is not None:
            stack.enter_context(netns.entered(pod_netns))
        return os.open("node", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)


def make_node(path: str, device: tuple[int, int], owner: int, group: int) -> None:
    """Make a device node for a launcher that opens by path, as libvirt in a pod does. Raises CniError 5.

    device: (major, minor). The node appears with its owner, group and mode 0660.
    """
    made = f"{path}.new"
    try:
        with suppress(FileNotFoundError):
            os.unlink(made)
        os.mknod(made, stat.S_IFCHR | 0o600, os.makedev(*device))
        os.chown(made, owner, group)
        os.chmod(made, 0o660)  # mknod obeys the umask
        os.rename(made, path)
    except OSError as error:
        with suppress(FileNotFoundError):
            os.unlink(made)
        raise CniError(IO_FAILURE, f"the device node {path} cannot be made", reason(error)) from error


def flags(queues: int) -> int:
    """The flags to open a tap with: QEMU expects a virtio header and no packet information."""
    return IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)


def ifreq(ifname: str, value: int = 0) -> bytes:
    """struct ifreq with ifr_flags."""
    return struct.pack("16sH22x", ifname.encode(), value)


def _open_macvtap(links: Sysfs, _pod_netns: int, record: Record) -> int:
    before = _number(links, record.ifname)
    if before[0] != record.ifindex:
        raise _gone(record, f"its ifindex is {before[0]}, the attachment's was {record.ifindex}")
    try:
        fd = open_node(before[1:])
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise CniError(
                DEVICE_BUSY, f"{record.ifname}: all 256 queues are open; end the process that holds them"
            ) from None
        raise _gone(record, reason(error)) from error
    try:
        if os.fstat(fd).st_rdev != os.makedev(*before[1:]) or _number(links, record.ifname) != before:
            raise _gone(record, "it was replaced while it was opened")
        _verify(fd, record)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_tap(links: Sysfs, pod_netns: int, record: Record) -> int:
    fd = open_node(TUN, pod_netns)
    try:
        try:
            ioctl(fd, TUNSETIFF, ifreq(record.ifname, flags(record.queues)))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise CniError(
                    DEVICE_BUSY,
                    f"{record.ifname} is in use: a tap of one queue has one holder; end the other process",
                ) from None
            raise CniError(
                WRONG_DEVICE, f"{record.ifname} is not the tap that ADD made", reason(error)
            ) from error
        _, attached = struct.unpack("16sH22x", ioctl(fd, TUNGETIFF, bytes(40)))
        if not attached & IFF_PERSIST:  # TUNSETIFF has made a new tap, which ends with the fd
            raise _gone(record, "no persistent tap has this name")
        index = int(links.attribute(f"{record.ifname}/ifindex"))
        if index != record.ifindex:
            raise _gone(record, f"its ifindex is {index}, the attachment's was {record.ifindex}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _verify(fd: int, record: Record) -> None:
    try:
        name = ioctl(fd, TUNGETIFF, bytes(40))[:16].rstrip(b"\0").decode()
        found = ioctl(fd, SIOCGIFHWADDR, bytes(40))[18:24].hex(":")
    except OSError as error:  # ENOLINK: the fd's link is deleted
        raise _gone(record, reason(error)) from error
    if (name, found) != (record.ifname, record.mac):
        raise CniError(
            WRONG_DEVICE,
            f"{record.ifname} is not what ADD made: it is {name} with MAC {found}, and {record.mac} was given to it; "
            "give the pod a new sandbox",
        )


def _gone(record: Record, why: str) -> CniError:
    return CniError(
        NO_ATTACHMENT,
        f"the link {record.ifname} that ADD made is gone: give the pod a new sandbox (or DEL and ADD)",
        why,
    )


def _number(links: Sysfs, ifname: str) -> tuple[int, int, int]:
    try:
        index = int(links.attribute(f"{ifname}/ifindex"))
        major, minor = links.attribute(f"{ifname}/macvtap/tap{index}/dev").split(":")
        return index, int(major), int(minor)
    except OSError as error:
        raise CniError(
            NO_ATTACHMENT, f"there is no macvtap {ifname} in the namespace", reason(error)
        ) from error
