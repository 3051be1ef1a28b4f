"""Tests whether this kernel and this user can do what an ADD and a launcher do, in namespaces of its own.

A thread enters a new network namespace and makes a tap in it, and in a second one a macvtap on the tap, which it opens
as the launcher does. Nothing is made in the node's namespace, and nothing is left. The kernel loads the modules that
this needs, as for a first ADD.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from contextlib import ExitStack

from cni.errors import CniError, reason
from cni.kernel import macvtap, netns, tap, tapdev
from cni.kernel.rtnl import (
    IFF_UP,
    NETLINK_LISTEN_ALL_NSID,
    NETLINK_ROUTE,
    RTM_SETLINK,
    SOL_NETLINK,
    Rtnl,
    link_message,
)
from cni.state.record import Record
from cni.state.store import IFINDEX_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = (
    "a network namespace",
    "a tap in it",
    "a macvtap in one namespace on a device of another",
    "its character device, found in a detached sysfs",
    "reading a link of another namespace",
    "events of links in other namespaces",
)

_LOWER = 2
RECORD = Record(
    network="trial",
    container_id="trial",
    ifname="trial1",
    netns=netns.OWN,
    netns_id=(0, 0),
    nsid=0,
    device="macvtap",
    ifindex=IFINDEX_BASE,
    mac="02:00:00:00:00:01",
    mtu=1500,
    queues=1,
    boot_id="",
)


def run(*, opens: bool = True) -> dict[str, str | None]:
    """Each step → why it failed, or None if it works. Steps after a failure are left out.

    opens: False leaves the opening of the device out, which only an agent does that has an fd broker.
    """
    done: dict[str, str | None] = {}

    def body() -> None:
        with ExitStack() as stack:
            try:
                for step in _steps(stack, opens=opens):
                    done[step] = None
            except (CniError, OSError) as error:
                done[STEPS[len(done)]] = reason(error)

    thread = threading.Thread(target=body, name="trial")
    thread.start()
    thread.join()
    return done


def _steps(stack: ExitStack, *, opens: bool) -> Iterator[str]:
    """Yield each of STEPS after it has worked. Raises OSError, CniError."""
    names = iter(STEPS)
    node = leave(stack)
    yield next(names)
    tap.create(node, ifname="trial0", ifindex=_LOWER, queues=1, owner=None, group=None)
    host = stack.enter_context(Rtnl())
    host.do(link_message(RTM_SETLINK, index=_LOWER, flags=IFF_UP, change=IFF_UP))
    lower = host.link(index=_LOWER)
    assert lower is not None  # noqa: S101 - it was made above
    yield next(names)
    record = RECORD
    pod = leave(stack)
    there = stack.enter_context(Rtnl())
    macvtap.create(
        host,
        netns=pod,
        lower=lower,
        ifname=record.ifname,
        ifindex=record.ifindex,
        mode="bridge",
        mac=record.mac,
        mtu=lower.mtu,
        bcqueuelen=None,
    )
    macvtap.bring_up(there, record.ifindex, record.alias, promisc=False, allmulti=True, speaks=False)
    yield next(names)
    for fd in tapdev.open_queues(pod, record, 1) if opens else ():
        os.close(fd)
    yield next(names)
    if host.link(index=record.ifindex, nsid=host.nsid(pod)) is None:
        raise OSError("the kernel does not know IFLA_TARGET_NETNSID")
    yield next(names)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as news:
        news.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
    yield next(names)


def leave(stack: ExitStack) -> int:
    """Move the calling thread into a new network namespace. Returns an fd of it, which the stack closes."""
    if netns.libc.unshare(netns.CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    fd = os.open(netns.OWN, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
