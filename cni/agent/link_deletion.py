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
from cni.state.lock import keep_turn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

_SPARE = 8
"""Idle threads that are kept."""
_SOON_MS = 1
"""A link is gone within that time if no other request holds RTNL: not worth waking the thread of the next request."""

_AT_TYPE = 4  # nlmsghdr.nlmsg_type
_AT_IFINDEX = 16 + 4  # ifinfomsg.ifi_index


class LinkDeleter:
    """A DeleteLink (kernel/rtnl.py) that returns once the link is gone. Without a free thread of `most`, it blocks."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._deletions: SimpleQueue[_Deletion] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._idle = 0

    def __call__(
        self, host: Rtnl, index: int, nsid: int | None, yield_turn: Callable[[], None] = keep_turn
    ) -> None:
        """Delete the link of that index, in host's namespace or in the namespace nsid. Raises OSError.

        yield_turn: called before a wait that is longer than _SOON_MS.
        """
        with watch(index) as gone, _Deletion(index, nsid) as deletion:
            poll = select.poll()
            poll.register(gone, select.POLLIN)
            poll.register(deletion.done, select.POLLIN)
            if not self._begin(deletion):
                yield_turn()
                deletion.carry_out(host)
            if not (events := poll.poll(_SOON_MS)):
                yield_turn()
            while True:
                ready = {fd for fd, _ in events or poll.poll()}
                events = []
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
        """Give the deletion to an idle thread, else to a new one; False if that is not possible.

        There are at most `most`, and each has a socket, for which there may be no fd.
        """
        with self._lock:
            new = self._idle == 0
            if new and self._threads >= self._most:
                return False
            try:
                own = Rtnl() if new else None
            except OSError:
                return False
            self._threads += new
            self._idle -= not new
        self._deletions.put(deletion)
        if own:
            threading.Thread(target=self._serve, args=(own,), name="link deletion", daemon=True).start()
        return True

    def _serve(self, own: Rtnl) -> None:
        with own:
            while True:
                self._deletions.get().carry_out(own)
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

    def carry_out(self, host: Rtnl) -> None:
        """Delete the link, set error if that fails, and make done readable. host: a socket of the host's namespace."""
        try:
            delete_link(host, self._index, self._nsid)
        except OSError as error:
            self.error = error
        finally:
            os.close(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.done)


def watch(index: int) -> socket.socket:
    """A socket that becomes readable when a link of that index is deleted, in any network namespace (_nsid).

    The kernel drops all other messages, so that a hundred DELs at once do not each read all of them.
    """
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
    bpf.keep_only(events, (_AT_TYPE, struct.pack("=H", RTM_DELLINK)), (_AT_IFINDEX, struct.pack("=i", index)))
    events.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
    events.bind((0, RTMGRP_LINK))
    return events


def _nsid(watch: socket.socket) -> int | None:
    """The id of the namespace of the next event; None for the socket's own. Raises OSError.

    Root of a pod's user namespace may delete a link of any index in its own namespace.
    """
    _, ancillary, _, _ = watch.recvmsg(_AT_IFINDEX, socket.CMSG_SPACE(4))
    return next(
        (struct.unpack("=i", data)[0] for _, kind, data in ancillary if kind == NETLINK_LISTEN_ALL_NSID), None
    )
