"""Supervises QEMU as its parent: turns signals into an orderly power-down, and exits with QEMU's status.

Runs after the privileges are dropped, so the parent has no more than QEMU. Does not interpret QMP answers: a guest may
control QEMU.

Each SIGTERM, SIGINT or SIGHUP takes the next step: ACPI power-down; QMP quit; SIGKILL. A step that has not ended QEMU
in its time is followed by the next. These signals are blocked in QEMU, because a terminal and systemd send them to the
whole process group. The kernel kills QEMU if the launcher dies (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import suppress
from itertools import islice

from cni.launcher import privilege

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
QUIT_SECONDS = 5.0
"""From QMP quit, in which QEMU flushes its disks, to SIGKILL."""


def monitor() -> tuple[int, int]:
    """The two fds of a QMP connection: the launcher's and QEMU's."""
    ours, qemus = socket.socketpair()
    return ours.detach(), qemus.detach()


def run(
    start: Callable[[], NoReturn], monitor: int, *, close: Iterable[int], deadline: float
) -> tuple[int, bool]:
    """Fork, call start() in the child, and wait until the child ends.

    close: fds of the child that the parent closes. deadline: seconds from a power-down to quit. An error of start()
    propagates in the child, whose caller reports it and exits.
    Returns QEMU's exit status (128 + n if signal n killed it), and whether QEMU ended by itself before it was ready.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a signal must not be lost before set_wakeup_fd
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        start()
    for fd in close:
        os.close(fd)
    with _Vm(child, monitor, deadline) as vm:
        return vm.wait()


def _die_with(parent: int) -> None:
    """In the child: be killed when the parent dies. Checks after prctl(2), which does not cover an earlier death."""
    privilege.prctl(privilege.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


class _Vm:
    """One running QEMU. Waits on three fds: its pidfd, its monitor, and the wakeup fd of Python's signal handlers."""

    def __init__(self, pid: int, monitor: int, deadline: float) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._monitor = socket.socket(fileno=monitor)
        self._monitor.setblocking(False)
        self._lines = 0
        self._stopping = False
        self._steps: Iterator[tuple[Callable[[], None], float | None]] = iter(
            (
                (lambda: self._send("system_powerdown"), deadline),
                (lambda: self._send("quit"), QUIT_SECONDS),
                (lambda: signal.pidfd_send_signal(self._pidfd, signal.SIGKILL), None),
            )
        )
        self._until: float | None = None
        self._woken, self._waker = socket.socketpair()

    def __enter__(self) -> _Vm:
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if (
                signal.getsignal(number) is not signal.SIG_IGN
            ):  # ignored by nohup(1) or a shell's "&": keep that
                signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._send("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for held in (self._woken, self._waker, self._monitor):
            held.close()
        os.close(self._pidfd)

    def wait(self) -> tuple[int, bool]:
        poll = select.poll()
        for fd in (self._pidfd, self._monitor.fileno(), self._woken.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._milliseconds())}
            if self._monitor.fileno() in ready and not self._receive():
                poll.unregister(self._monitor)
            if self._pidfd in ready:
                status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                return (status if status >= 0 else 128 - status), self._lines < 2 and not self._stopping
            signals = len(self._woken.recv(64)) if self._woken.fileno() in ready else 0
            expired = self._until is not None and time.monotonic() >= self._until
            for _ in range(max(signals, expired)):
                self._next_step()

    def _milliseconds(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic()) * 1000

    def _next_step(self) -> None:
        self._stopping = True
        for step, seconds in islice(self._steps, 1):
            self._until = None if seconds is None else time.monotonic() + seconds
            step()

    def _send(self, command: str) -> None:
        with suppress(
            OSError
        ):  # QEMU has closed it, or does not read: SIGKILL, the last step, needs no monitor
            self._monitor.send(b'{"execute":"%s"}\n' % command.encode())

    def _receive(self) -> bool:
        """Count QEMU's lines; False once it has closed the monitor. Line 1 is the greeting, line 2 the first answer."""
        try:
            data = self._monitor.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._lines += data.count(b"\n")
        return bool(data)
