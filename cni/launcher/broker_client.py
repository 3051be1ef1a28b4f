"""Client of the fd broker: sends one request to the node agent and receives open fds.

cni/agent/broker.py is the server and documents the protocol. The agent identifies this process by its network
namespace, so the client sends no credentials. Imported only if a socket is used.
"""

from __future__ import annotations

import json
import socket

from cni import spec
from cni.dataclass import dataclass
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from cni.state.record import Record

_SECONDS = 30.0
"""The agent answers in milliseconds; a node that starts a hundred pods may take longer."""
_SCM_MAX_FD = 253  # linux/net/scm.h
_ANSWER_LIMIT = 16 << 20


@dataclass(frozen=True)
class Attachment:
    """The fields of a Record (cni/state/record.py) that the broker shows to a pod."""

    network: str
    ifname: str
    device: str
    mode: str | None
    mac: str
    mtu: int
    queues: int
    ips: tuple[dict[str, Any], ...]
    routes: tuple[dict[str, Any], ...]
    dns: dict[str, Any] | None


if TYPE_CHECKING:
    Described = Record | Attachment


def ask(
    path: str, *, ifnames: Sequence[str], queues: int | None, shared: bool, open: bool
) -> list[tuple[Attachment, list[int]]]:
    """The attachments, each with its fds (close-on-exec; none without open).

    Raises CniError: the broker's error, or TRY_AGAIN_LATER if the agent does not answer.
    """
    request: dict[str, object] = {"ifnames": list(ifnames), "shared": shared, "open": open}
    if queues is not None:
        request["queues"] = queues
    fds: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(path)
            _answer(_line(connection, fds))
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = _answer(_line(connection, fds))
    except OSError as error:
        raise CniError(
            spec.TRY_AGAIN_LATER,
            f"the node agent does not answer on {path}; is vmtapd running on the node?",
            reason(error),
        ) from error
    described = [(_attachment(each), int(each["opened"])) for each in answer["attachments"]]
    if len(fds) != sum(opened for _, opened in described):
        raise CniError(
            spec.TRY_AGAIN_LATER,
            f"{len(fds)} fds arrived for {len(described)} attachments: is the limit of open files (ulimit -n) too low?",
        )
    received = iter(fds)
    return [(attachment, [next(received) for _ in range(opened)]) for attachment, opened in described]


def _line(connection: socket.socket, fds: list[int]) -> bytes:
    """The agent's next line. Appends the fds that arrive with it to fds."""
    line = b""
    while not line.endswith(b"\n"):
        data, more, _, _ = socket.recv_fds(connection, 65536, _SCM_MAX_FD, socket.MSG_CMSG_CLOEXEC)
        fds += more
        line += data
        if not data or len(line) > _ANSWER_LIMIT:
            raise ConnectionError("the connection ended within the answer")
    return line


def _answer(line: bytes) -> dict[str, Any]:
    """The JSON object in the line. Raises the CniError that it contains, if it is an error."""
    document: dict[str, Any] = json.loads(line)
    if error := document.get("error"):
        raise CniError(int(error["code"]), str(error["msg"]), str(error["details"]))
    return document


def _attachment(document: dict[str, Any]) -> Attachment:
    known = {name: document[name] for name in Attachment.__annotations__}
    return Attachment(**known | {"ips": tuple(known["ips"]), "routes": tuple(known["routes"])})
