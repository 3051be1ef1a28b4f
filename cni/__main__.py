"""The CNI executable, one-shot: environment and stdin in, one JSON document on stdout, an exit status.

A thin caller of plugin.handle: everything that belongs to the process is here, and nothing else.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from cni import plugin
from cni.config.netconf import MAX_BYTES
from cni.errors import CniError
from cni.spec import INVALID_ENVIRONMENT, IO_FAILURE, TRY_AGAIN_LATER, VERSIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

STDIN_SECONDS = 10.0
_END = (signal.SIGTERM, signal.SIGINT)


class _Terminated(BaseException):
    """SIGTERM or SIGINT: whatever is under way is undone on its way out."""


def main() -> int:
    """Run one request; the exit status."""
    _open_standard_streams()
    env = dict(os.environ)
    name = os.path.basename(sys.argv[0])
    if not any(key.startswith("CNI_") for key in env):
        _say(
            f"{name}: a CNI plugin that puts a VM on a NIC by macvtap or tap; a container runtime runs it.\n"
            f"CNI protocol versions supported: {', '.join(VERSIONS)}"
        )
        return 0
    request = plugin.Request(
        env=env,
        stdin=b"",
        policy=env.get("VMTAP_POLICY") or "/etc/vmtap/interfaces.yaml",
        state=env.get("VMTAP_STATE") or "/run/vmtap",
        called_as="macvtap" if name == "macvtap" else "vmtap",
        note=lambda text: _say(f"{name}: {text}"),
    )
    try:
        for number in _END:
            signal.signal(number, _terminate)
        try:
            request = _with(request, stdin=_read(), delegate_seconds=_delegate_seconds(env))
            response = plugin.handle(request)
        except CniError as error:
            response = plugin.refuse(request, error)
        _ignore_end()  # from here on it is too late: there is one answer, and it is on its way
    except _Terminated:
        gone = CniError(TRY_AGAIN_LATER, f"{name} was told to end; what it had begun is undone")
        response = plugin.refuse(request, gone)
    if response.error:
        _say(f"{name}: {response.error}")
    if not _write(1, response.stdout):
        if env.get("CNI_COMMAND") == "ADD" and response.status == 0:  # nobody will know of it: undo it
            plugin.handle(_with(request, env={**env, "CNI_COMMAND": "DEL"}))
        return 1
    return response.status


def _delegate_seconds(env: dict[str, str]) -> float:
    """How long an IPAM delegate may take. Runtimes have deadlines of their own: ours has to end before theirs."""
    text = env.get("VMTAP_DELEGATE_SECONDS") or "60"
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise CniError(
            INVALID_ENVIRONMENT, f"VMTAP_DELEGATE_SECONDS {text!r} must be a number of seconds from 1"
        )
    return float(text)


def _open_standard_streams() -> None:
    """Those that are closed, or a file of ours would get their number. Writing to this stdout fails, as it should."""
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", mode)  # the lowest free number: this one


def _with(request: plugin.Request, **changed: object) -> plugin.Request:
    from dataclasses import replace  # noqa: PLC0415 - loaded already

    return replace(request, **changed)  # type: ignore[arg-type]


def _read() -> bytes:
    """Everything on stdin, up to a size and a deadline that a runtime never meets."""
    data = bytearray()
    deadline = time.monotonic() + STDIN_SECONDS
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    while len(data) <= MAX_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise CniError(IO_FAILURE, f"the network config on stdin did not end within {STDIN_SECONDS:g} s")
        try:
            part = os.read(0, 1 << 16)
        except OSError as error:
            raise CniError(IO_FAILURE, "the network config on stdin cannot be read", str(error)) from None
        if not part:
            break
        data += part
    return bytes(data)


def _say(text: str) -> None:
    """On stderr, whether or not anybody reads it."""
    _write(2, f"{text}\n".encode(errors="backslashreplace"))


def _write(fd: int, data: bytes) -> bool:
    """Whether all of it was written."""
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return False
    return True


def _ignore_end() -> None:
    for number in _END:
        signal.signal(number, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> None:
    _ignore_end()  # once: the undoing must not be interrupted
    raise _Terminated


if __name__ == "__main__":
    sys.exit(main())
