"""Keeps the fds that a pod sends over a unix socket (SCM_RIGHTS) from being closed in a thread that others need.

The close of a file may sleep for as long as the sender likes: that of a TCP socket with SO_LINGER and unsent data, for
example. An fd that was sent and not received is closed by the thread that closes the socket at which it waits.

Since Linux 6.16 a socket can refuse fds (SO_PASSRIGHTS); accepted sockets inherit this from the listener. On older
kernels, close() leaves the last close to the exit of a thread with an fd table of its own: an exiting thread does not
wait for SO_LINGER (PF_EXITING in inet_release, net/ipv4/af_inet.c), and no thread waits for its exit.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from logging import ERROR

from cni.agent.log import log
from cni.kernel.netns import libc

SO_PASSRIGHTS = 83  # asm-generic/socket.h
_CLONE_FILES = 0x400
_MOST_EXITING = 64
"""Threads whose exit takes long: that of a file on an NFS server that has gone, for example."""
_PAUSE_SECONDS = 0.05

_one_at_a_time = threading.Lock()
"""Without it, the last close of a socket could be that of a thread which drops its copies of the other fds."""
_exiting: set[int] = set()


def refuse(listener: socket.socket) -> bool:
    """Have the kernel refuse fds that are sent to sockets accepted from now on; whether it can (Linux 6.16)."""
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:  # ENOPROTOOPT
        return False
    return True


def close(connection: socket.socket) -> None:
    """Close a connection at which fds may wait, without closing those in this thread.

    Waits while _MOST_EXITING threads are still closing what they were given.
    """
    fd = connection.detach()
    if fd < 0:
        return
    copied, closed = threading.Event(), threading.Event()

    def hold() -> None:
        """Hold the only other copy of the fd until the thread exits."""
        _exiting.add(threading.get_native_id())
        try:
            if libc.unshare(_CLONE_FILES) == 0:
                os.closerange(0, fd)
                os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
        finally:
            copied.set()
        closed.wait()

    with _one_at_a_time:
        while len(_exiting) >= _MOST_EXITING:
            _exiting.intersection_update(map(int, os.listdir("/proc/self/task")))
            if len(_exiting) >= _MOST_EXITING:
                time.sleep(_PAUSE_SECONDS)
        try:
            threading.Thread(target=hold, name="close", daemon=True).start()
        except RuntimeError as error:  # no thread can be made: an open fd is better than a thread that sleeps
            log(ERROR, "a connection stays open", error=str(error))
            return
        copied.wait()
        with suppress(OSError):
            os.close(fd)
        closed.set()
