"""The CNI executable, one-shot: environment and stdin in, one JSON document on stdout, an exit status.

A thin caller of plugin.handle(): it does what concerns the process, and nothing else.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from functools import partial

from cni import plugin
from cni.attach.call import Node, Request
from cni.config.netconf import MAX_BYTES, Document
from cni.config.policy import load as load_policy
from cni.dataclass import replace
from cni.errors import CniError, reason
from cni.names import escaped
from cni.spec import INVALID_ENVIRONMENT, IO_FAILURE, TRY_AGAIN_LATER, VERSIONS
from cni.state import folder
from cni.state.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

STDIN_SECONDS = 10.0
_END = (signal.SIGTERM, signal.SIGINT)


class _Terminated(BaseException):
    """Raised at SIGTERM or SIGINT, so that an ADD undoes what it has begun."""


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
    store = Store(folder.named(env) or folder.DEFAULT, lambda text: _say(f"{name}: {text}"))
    policy = partial(load_policy, env.get("VMTAP_POLICY") or "/etc/vmtap/interfaces.yaml")
    request = Request(env=env, stdin=b"", called_as="macvtap" if name == "macvtap" else "vmtap")
    try:
        for number in _END:
            signal.signal(number, _terminate)
        try:
            request = replace(request, stdin=_read())
            node = Node(store, policy, _delegate_seconds(env))
            response = plugin.handle(request, node)
        except CniError as error:
            response = plugin.refuse(Document(request.stdin), error)
        _ignore_end()  # the request is finished, and its one answer must be written
    except _Terminated:
        gone = CniError(TRY_AGAIN_LATER, f"{name} was told to end; what it had begun is undone")
        response = plugin.refuse(Document(request.stdin), gone)
    if response.error:
        _say(f"{name}: {response.error}")
    if not _write(1, response.stdout):
        # The runtime does not know of a link that was added: undo it.
        if env.get("CNI_COMMAND") == "ADD" and response.status == 0:
            plugin.handle(replace(request, env={**env, "CNI_COMMAND": "DEL"}), node)
        return 1
    return response.status


def _delegate_seconds(env: dict[str, str]) -> float:
    """How long an IPAM delegate may take: less than the runtime's own deadline for the plugin."""
    text = env.get("VMTAP_DELEGATE_SECONDS") or "60"
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise CniError(
            INVALID_ENVIRONMENT, f"VMTAP_DELEGATE_SECONDS {text!r} must be a number of seconds from 1"
        )
    return float(text)


def _open_standard_streams() -> None:
    """Open those of 0, 1 and 2 that are closed, or another file would get the number. A write to this stdout fails."""
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", mode)  # gets the lowest free number, which is fd


def _read() -> bytes:
    """Everything on stdin. Raises CniError 5 if it does not end in time; the parser refuses what is too large."""
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
            raise CniError(IO_FAILURE, "the network config on stdin cannot be read", reason(error)) from None
        if not part:
            break
        data += part
    return bytes(data)


def _say(text: str) -> None:
    """On stderr, whether or not anybody reads it."""
    _write(2, escaped(f"{text}\n", kept="\n").encode())


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


def run() -> None:
    """main(), and the end of the process. The interpreter's own end would take 5 ms to free what the kernel frees."""
    os._exit(main())  # nothing is buffered: all output is by write(2)


if __name__ == "__main__":
    run()
