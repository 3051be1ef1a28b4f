"""The launcher as QEMU's parent: signals become an orderly power-down, QEMU's end becomes the launcher's.

Runs after the privilege is gone, so the parent holds no more of it than QEMU. Reads no answer of QMP: QEMU
may be in a guest's hands, and nothing that it says is believed.

SIGTERM, SIGINT and SIGHUP go one step further each time: ACPI power-down; QMP quit; SIGKILL. A step that has
not helped in its time makes way for the next. QEMU has these signals blocked, because a terminal and systemd
send them to the launcher's whole group; and the kernel kills it if the launcher dies.
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
"""How long QEMU has to flush its disks after QMP quit, before SIGKILL."""


def monitor() -> tuple[int, int]:
    """The two ends of a QMP connection: the launcher's and QEMU's."""
    ours, qemus = socket.socketpair()
    return ours.detach(), qemus.detach()


def run(
    start: Callable[[], NoReturn], monitor: int, *, close: Iterable[int], deadline: float
) -> tuple[int, bool]:
    """Forks, calls start in the child, waits for its end.

    close: the fds that are the child's alone. deadline: seconds from a power-down to quit. An error that
    start raises leaves this function in the child, which has only to report it and exit.
    Returns QEMU's exit status (128 + n for a death by signal n), and whether that came
    unasked, before QEMU was ready.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # none may be lost between fork and set_wakeup_fd
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
    """In the child. The order matters: a parent that died before prctl(2) sends no signal."""
    privilege.prctl(privilege.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


class _Vm:
    """One running QEMU. Waits on three fds: its pidfd, its monitor, and Python's note that a signal came."""

    def __init__(self, pid: int, monitor: int, deadline: float) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._monitor = socket.socket(fileno=monitor)
        self._monitor.setblocking(False)
        self._lines = 0
        self._told = False
        self._steps: Iterator[tuple[Callable[[], None], float | None]] = iter(
            (
                (lambda: self._say("system_powerdown"), deadline),
                (lambda: self._say("quit"), QUIT_SECONDS),
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
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) and a shell's "&" mean it
                signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._say("qmp_capabilities")
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
            if self._monitor.fileno() in ready and not self._listen():
                poll.unregister(self._monitor)
            if self._pidfd in ready:
                status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                return (status if status >= 0 else 128 - status), self._lines < 2 and not self._told
            signals = len(self._woken.recv(64)) if self._woken.fileno() in ready else 0
            expired = self._until is not None and time.monotonic() >= self._until
            for _ in range(max(signals, expired)):
                self._next_step()

    def _milliseconds(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic()) * 1000

    def _next_step(self) -> None:
        self._told = True
        for step, seconds in islice(self._steps, 1):
            self._until = None if seconds is None else time.monotonic() + seconds
            step()

    def _say(self, command: str) -> None:
        with suppress(OSError):  # gone or deaf: the last step does not need it to listen
            self._monitor.send(b'{"execute":"%s"}\n' % command.encode())

    def _listen(self) -> bool:
        """False at the end. The first line is a greeting; the second answers us, so QEMU is ready."""
        try:
            said = self._monitor.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            said = b""
        self._lines += said.count(b"\n")
        return bool(said)
