"""Events of programs that start, from the process connector (linux/cn_proc.h): which has a VM's device open?

The kernel has no event for the opening of a macvtap. A launcher opens the device and then executes QEMU, so a process
is examined when it has executed a program. The kernel sends these events in the first network namespace only.
"""

from __future__ import annotations

import os
import socket
import struct

from cni.ctl import open_devices
from cni.kernel import bpf

_NETLINK_CONNECTOR = 11
_CN_IDX_PROC = _CN_VAL_PROC = 1
_PROC_CN_MCAST_LISTEN = 1
_PROC_EVENT_EXEC = 2
_NLMSG_DONE = 3
_WHAT = 16 + 20  # nlmsghdr, cn_msg; then struct proc_event: what, cpu, timestamp_ns, process_pid
_PID = _WHAT + 16
_CN_MSG = struct.Struct("=IIIIHHI")


class Execs:
    """Its fd is readable when a program has started. Raises OSError if the kernel has no process connector here."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_CONNECTOR
        )
        try:
            # The connector reports forks and exits, too: they must not wake this process.
            bpf.keep_only(self._socket, (_WHAT, struct.pack("=I", _PROC_EVENT_EXEC)))
            self._socket.bind((0, _CN_IDX_PROC))
            body = _CN_MSG.pack(_CN_IDX_PROC, _CN_VAL_PROC, 0, 0, 4, 0, _PROC_CN_MCAST_LISTEN)
            self._socket.send(struct.pack("=IHHII", 16 + len(body), _NLMSG_DONE, 0, 0, os.getpid()) + body)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def relevant(self) -> bool:
        """Whether a program that has started since the last call has the device of a tap or macvtap open."""
        found = False
        while True:
            try:
                data = self._socket.recv(4096)
            except BlockingIOError:
                return found
            except OSError:  # ENOBUFS: more than we could take in
                return True
            found = found or open_devices.may_hold(struct.unpack_from("=i", data, _PID)[0])
