"""The launcher's end of the fd broker: one request to the node agent, and the open fds that come back.

cni/agent/broker.py has the protocol. The agent knows this process by its network namespace, so there is nothing to
prove here and nothing to configure but the socket. Imported only where there is a socket to ask.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, fields

from cni import spec
from cni.errors import CniError

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
    """What a pod may know of its attachment; the fields are state.Record's."""

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
    """The attachments, and each one's fds, close-on-exec; none if they are only to be described.

    Raises CniError: the broker's, or TRY_AGAIN_LATER where nobody answers.
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
            str(error),
        ) from error
    described = [(_attachment(each), int(each["opened"])) for each in answer["attachments"]]
    if len(fds) != sum(opened for _, opened in described):
        raise CniError(
            spec.TRY_AGAIN_LATER,
            f"{len(fds)} fds came for {len(described)} attachments: is the limit of open files (ulimit -n) too low?",
        )
    given = iter(fds)
    return [(attachment, [next(given) for _ in range(opened)]) for attachment, opened in described]


def _line(connection: socket.socket, fds: list[int]) -> bytes:
    """The agent's next one; what fds come along are added."""
    said = b""
    while not said.endswith(b"\n"):
        data, more, _, _ = socket.recv_fds(connection, 65536, _SCM_MAX_FD, socket.MSG_CMSG_CLOEXEC)
        fds += more
        said += data
        if not data or len(said) > _ANSWER_LIMIT:
            raise ConnectionError("it ended in the middle of its answer")
    return said


def _answer(line: bytes) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(line)
    if error := document.get("error"):
        raise CniError(int(error["code"]), str(error["msg"]), str(error["details"]))
    return document


def _attachment(document: dict[str, Any]) -> Attachment:
    known = {field.name: document[field.name] for field in fields(Attachment)}
    return Attachment(**known | {"ips": tuple(known["ips"]), "routes": tuple(known["routes"])})
