"""Delete a link and go on as soon as it is gone, not when the kernel has finished waiting.

RTM_DELLINK blocks its sender for 15 to 40 ms, nearly all of it in netdev_run_todo, after the link is unlisted,
its MAC is free on the lower device and RTM_DELLINK was broadcast (net/core/dev.c, macvlan.c). So a thread of a bounded
number blocks, and the request waits for the broadcast. Must not be used by a process that is about to exit.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from queue import SimpleQueue

from cni.kernel import bpf
from cni.kernel.rtnl import (
    NETLINK_LISTEN_ALL_NSID,
    NETLINK_ROUTE,
    RTM_DELLINK,
    RTMGRP_LINK,
    SOL_NETLINK,
    Rtnl,
    delete_link,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_SPARE = 8
"""Threads that stay when all is quiet."""

_AT_TYPE = 4  # nlmsghdr.nlmsg_type
_AT_IFINDEX = 16 + 4  # ifinfomsg.ifi_index


class Unlinker:
    """A rtnl.DeleteLink that answers when the link is gone. most: links being waited for at once."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._works: SimpleQueue[_Work] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._idle = 0

    def __call__(self, host: Rtnl, index: int, nsid: int | None) -> None:
        """Raises OSError, as rtnl.delete_link does."""
        with _watch(index) as gone, _Work(index, nsid) as work:
            poll = select.poll()
            poll.register(gone, select.POLLIN)
            poll.register(work.done, select.POLLIN)
            if not self._begin(work):
                work.carry_out()
            ready = {fd for fd, _ in poll.poll()}
            if work.done in ready and work.error:
                raise work.error

    def _begin(self, work: _Work) -> bool:
        """Give it to an idle thread, else to a new one, which costs more than all the rest; False if none is left."""
        with self._lock:
            new = self._idle == 0
            if new and self._threads >= self._most:
                return False
            self._threads += new
            self._idle -= not new
        self._works.put(work)
        if new:
            threading.Thread(target=self._serve, name="unlink", daemon=True).start()
        return True

    def _serve(self) -> None:
        while True:
            self._works.get().carry_out()
            with self._lock:
                if self._idle >= _SPARE:
                    self._threads -= 1
                    return
                self._idle += 1


class _Work:
    """One deletion, to its very end. done: an fd that is readable then, open inside the with block."""

    def __init__(self, index: int, nsid: int | None) -> None:
        self._index, self._nsid = index, nsid
        self.error: OSError | None = None
        self.done, self._end = os.pipe()

    def carry_out(self) -> None:
        try:
            with Rtnl() as own:
                delete_link(own, self._index, self._nsid)
        except OSError as error:
            self.error = error
        finally:
            os.close(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.done)


def _watch(index: int) -> socket.socket:
    """A socket that becomes readable when a link of that index is gone, in whichever namespace.

    The kernel drops every other message, so that of a hundred DELs at once none reads the others' messages.
    """
    watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
    bpf.keep_only(watch, (_AT_TYPE, struct.pack("=H", RTM_DELLINK)), (_AT_IFINDEX, struct.pack("=i", index)))
    watch.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
    watch.bind((0, RTMGRP_LINK))
    return watch
