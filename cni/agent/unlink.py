"""Delete a link and go on as soon as it is gone, not when the kernel has finished waiting.

RTM_DELLINK blocks its sender for 15 to 40 ms, nearly all of it in netdev_run_todo, after the link is unlisted,
its MAC is free on the lower device and RTM_DELLINK was broadcast (net/core/dev.c, macvlan.c). So a thread of a bounded
number blocks, and the request waits for the broadcast. Must not be used by a process that is about to exit.
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import threading

from cni import attachment
from cni.rtnl import NETLINK_ROUTE, RTM_DELLINK, SOL_NETLINK, Rtnl

NETLINK_LISTEN_ALL_NSID = 8
RTMGRP_LINK = 1
SO_ATTACH_FILTER = 26

BPF_LD_H_ABS = 0x28
BPF_LD_W_ABS = 0x20
BPF_JEQ_K = 0x15
BPF_RET_K = 0x06

_AT_TYPE = 4  # nlmsghdr.nlmsg_type
_AT_IFINDEX = 16 + 4  # ifinfomsg.ifi_index


class Unlinker:
    """A attachment.DeleteLink that answers when the link is gone. most: links being waited for at once."""

    def __init__(self, most: int = 64) -> None:
        self._room = threading.BoundedSemaphore(most)

    def __call__(self, host: Rtnl, index: int, nsid: int | None) -> None:
        """Raises OSError, as attachment.delete_link does."""
        if not self._room.acquire(blocking=False):
            attachment.delete_link(host, index, nsid)
            return
        work = _Work(index, nsid, self._room)
        with _watch(index) as gone, work.done:
            poll = select.poll()
            poll.register(gone, select.POLLIN)
            poll.register(work.done, select.POLLIN)
            work.start()
            ready = {fd for fd, _ in poll.poll()}
            if work.done.fileno() in ready:
                work.finish()


class _Work(threading.Thread):
    """One deletion, to its very end."""

    def __init__(self, index: int, nsid: int | None, room: threading.BoundedSemaphore) -> None:
        super().__init__(name=f"unlink {index}", daemon=True)
        self._index, self._nsid, self._room = index, nsid, room
        self._error: OSError | None = None
        self.done, self._end = socket.socketpair()

    def run(self) -> None:
        try:
            with Rtnl() as own:
                attachment.delete_link(own, self._index, self._nsid)
        except OSError as error:
            self._error = error
        finally:
            self._room.release()
            self._end.close()  # readable at the other end

    def finish(self) -> None:
        """Raise what it met."""
        if self._error:
            raise self._error


def _watch(index: int) -> socket.socket:
    """A socket that becomes readable when a link of that index is gone, in whichever namespace.

    The filter is the kernel's (classic BPF, big-endian loads), so that a hundred DELs at once do not each read all
    the others' messages.
    """
    watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
    wanted_type = int.from_bytes(struct.pack("=H", RTM_DELLINK))
    wanted_index = int.from_bytes(struct.pack("=i", index))
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (BPF_LD_H_ABS, 0, 0, _AT_TYPE),
            (BPF_JEQ_K, 0, 3, wanted_type),
            (BPF_LD_W_ABS, 0, 0, _AT_IFINDEX),
            (BPF_JEQ_K, 0, 1, wanted_index),
            (BPF_RET_K, 0, 0, 0xFFFFFFFF),
            (BPF_RET_K, 0, 0, 0),
        )
    )
    held = ctypes.create_string_buffer(program, len(program))
    watch.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program) // 8, ctypes.addressof(held))
    )
    watch.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
    watch.bind((0, RTMGRP_LINK))
    return watch
