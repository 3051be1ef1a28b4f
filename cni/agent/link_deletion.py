"""Deletes a link and returns as soon as it is gone, before the kernel has finished.

RTM_DELLINK blocks its sender for 15 to 40 ms, nearly all of it in netdev_run_todo, after the link is unlisted, its MAC
is free on the lower device and RTM_DELLINK was broadcast (net/core/dev.c, macvlan.c). So one of a bounded number of
threads sends the message and blocks, while the caller waits for the broadcast. Must not be used by a process that is
about to exit.
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
"""Idle threads that are kept."""

_AT_TYPE = 4  # nlmsghdr.nlmsg_type
_AT_IFINDEX = 16 + 4  # ifinfomsg.ifi_index


class LinkDeleter:
    """An rtnl.DeleteLink that returns once the link is gone. most: threads; without a free one the caller blocks."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._deletions: SimpleQueue[_Deletion] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._idle = 0

    def __call__(self, host: Rtnl, index: int, nsid: int | None) -> None:
        """Delete the link of that index, in host's namespace or in the namespace nsid. Raises OSError."""
        with _watch(index) as gone, _Deletion(index, nsid) as deletion:
            poll = select.poll()
            poll.register(gone, select.POLLIN)
            poll.register(deletion.done, select.POLLIN)
            if not self._begin(deletion):
                deletion.carry_out()
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if deletion.done in ready:
                    if deletion.error:
                        raise deletion.error
                    return
                try:
                    if _nsid(gone) == nsid:
                        return
                except (
                    OSError
                ):  # ENOBUFS: a pod floods the socket; wait for the kernel's acknowledgement instead
                    poll.unregister(gone)

    def _begin(self, deletion: _Deletion) -> bool:
        """Give the deletion to an idle thread, else to a new one; False if there are `most` and all are busy."""
        with self._lock:
            new = self._idle == 0
            if new and self._threads >= self._most:
                return False
            self._threads += new
            self._idle -= not new
        self._deletions.put(deletion)
        if new:
            threading.Thread(target=self._serve, name="link deletion", daemon=True).start()
        return True

    def _serve(self) -> None:
        while True:
            self._deletions.get().carry_out()
            with self._lock:
                if self._idle >= _SPARE:
                    self._threads -= 1
                    return
                self._idle += 1


class _Deletion:
    """One deletion. done: an fd that is readable once the kernel has finished; open within the with block."""

    def __init__(self, index: int, nsid: int | None) -> None:
        self._index, self._nsid = index, nsid
        self.error: OSError | None = None
        self.done, self._end = os.pipe()

    def carry_out(self) -> None:
        """Delete the link, set error if that fails, and make done readable."""
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
    """A socket that becomes readable when a link of that index is deleted, in any network namespace (_nsid).

    The kernel drops all other messages, so that a hundred DELs at once do not each read all of them.
    """
    watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
    bpf.keep_only(watch, (_AT_TYPE, struct.pack("=H", RTM_DELLINK)), (_AT_IFINDEX, struct.pack("=i", index)))
    watch.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
    watch.bind((0, RTMGRP_LINK))
    return watch


def _nsid(watch: socket.socket) -> int | None:
    """The id of the namespace of the next event; None for the socket's own. Raises OSError.

    Root of a pod's user namespace may delete a link of any index in its own namespace.
    """
    _, ancillary, _, _ = watch.recvmsg(_AT_IFINDEX, socket.CMSG_SPACE(4))
    return next(
        (struct.unpack("=i", data)[0] for _, kind, data in ancillary if kind == NETLINK_LISTEN_ALL_NSID), None
    )
