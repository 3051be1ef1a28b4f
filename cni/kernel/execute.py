"""Run another program: bounded in time and output, and ended together with everything that it has started.

The shim supervises it (supervise() in cni/shim/vmtap.c), as the reaper of all its descendants; this process cannot be
that, since it may run several programs at once. Where the shim was not built, a descendant that has left the program's
process group lives on. In either case, one that keeps a pipe open delays nobody. Must not know what the program is for.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from cni.dataclass import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

_SHIM = os.path.join(os.path.dirname(os.path.dirname(__file__)), "shim", "vmtap")
_ENDING = 2.0
"""Seconds that the supervisor has to end what it supervises."""
_PART = 1 << 16
_STDERR = 1 << 14
"""Bytes of stderr that are kept."""
_PAUSE = 0.01
"""The shortest wait, in seconds."""


@dataclass(frozen=True)
class Finished:
    """What an execution left."""

    status: int
    """The exit status, or 128 and the number of the signal that ended it."""
    out: bytes
    err: bytes
    late: bool
    """Whether it was killed at the deadline."""
    flooded: bool
    """Whether it was killed because it wrote more to stdout than allowed."""


def execute(program: str, stdin: bytes, env: Mapping[str, str], *, seconds: float, most: int) -> Finished:
    """Run the program with that stdin and environment, until it ends, or for so many seconds at most.

    most: bytes of stdout, beyond which it is killed. Of stderr, 16 KiB are kept. Raises OSError if it cannot start.
    """
    import subprocess  # noqa: PLC0415 - these take 20 ms, and only a delegate needs them

    supervisor = [_SHIM, "--supervise", str(os.getpid())] if os.access(_SHIM, os.X_OK) else []
    process = subprocess.Popen(
        [*supervisor, program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        start_new_session=True,
    )
    with process:
        try:
            return _follow(process, stdin, time.monotonic() + seconds, most)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process, the supervisor's way if it can, and reap it."""
    import signal  # noqa: PLC0415
    import subprocess  # noqa: PLC0415

    if process.returncode is None and _is_supervised(process):
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING)
    if process.returncode is None:  # after that, its number may be another's
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_supervised(process: subprocess.Popen[bytes]) -> bool:
    return isinstance(process.args, list) and process.args[0] == _SHIM


def _follow(process: subprocess.Popen[bytes], stdin: bytes, until: float, most: int) -> Finished:
    """Feed and read the process until it ends, or is killed at the deadline or for its output; reap it."""
    import selectors  # noqa: PLC0415

    assert process.stdin  # noqa: S101 - it is a pipe, as the next two
    assert process.stdout  # noqa: S101
    assert process.stderr  # noqa: S101
    out, err = _Output(process.stdout.fileno(), most), _Output(process.stderr.fileno(), _STDERR)
    given, left = process.stdin.fileno(), memoryview(stdin)
    ended = os.pidfd_open(process.pid)
    late = False
    try:
        with selectors.DefaultSelector() as selector:
            os.set_blocking(given, False)
            selector.register(given, selectors.EVENT_WRITE)
            for fd in (out.fd, err.fd, ended):
                selector.register(fd, selectors.EVENT_READ)
            while not (late or out.flooded):
                ready = {key.fd for key, _ in selector.select(max(_PAUSE, until - time.monotonic()))}
                if given in ready:
                    try:
                        left = left[os.write(given, left[:_PART]) :]
                    except BrokenPipeError:  # the program does not read it
                        left = left[:0]
                    if not left:
                        selector.unregister(given)
                        process.stdin.close()
                for output in (out, err):
                    if output.fd in ready and not output.read():
                        selector.unregister(output.fd)
                if ended in ready:
                    break
                late = _passed(until)
        _end(process)
    finally:
        os.close(ended)
    for output in (out, err):  # what it wrote last, and not what a descendant may still write
        while not output.flooded and output.read():
            pass
    return Finished(process.returncode, bytes(out.data), bytes(err.data[:_STDERR]), late, out.flooded)


def _passed(until: float) -> bool:
    return time.monotonic() >= until


class _Output:
    """A pipe that the program writes to, and what has been read of it: at most one byte more than is allowed."""

    def __init__(self, fd: int, most: int) -> None:
        self.fd, self.data, self._most = fd, bytearray(), most
        os.set_blocking(fd, False)

    def read(self) -> bool:
        """Read what there is, up to 64 KiB; False at the end, or if there is nothing now."""
        try:
            part = os.read(self.fd, _PART)
        except BlockingIOError:
            return False
        self.data += part[: self._most + 1 - len(self.data)]
        return bool(part)

    @property
    def flooded(self) -> bool:
        """Whether it is more than is allowed."""
        return len(self.data) > self._most
