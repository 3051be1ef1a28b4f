"""The agent's health: the checks, the page that reports why any of them fails, and others. Must not change anything."""

from __future__ import annotations

import json
import socket
from http import HTTPStatus

from cni.agent.http_server import Answer
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cni.agent.http_server import Page

    Check = Callable[[], str | None]

_PROBE_SECONDS = 2.0
"""How long served() waits for an answer on the CNI socket."""


def page(checks: Mapping[str, Check]) -> Page:
    """The page of the checks, each of which returns why it fails, or None: 200 if none does, else 503."""

    def answer() -> Answer:
        why = _reasons(checks)
        status = HTTPStatus.SERVICE_UNAVAILABLE if why else HTTPStatus.OK
        body = json.dumps({"ok": not why, "reasons": why}).encode() + b"\n"
        return Answer(status, "application/json", body)

    return answer


def shown(look: Callable[[], Mapping[str, object]]) -> Page:
    """The page of what look() returns, as JSON."""
    return lambda: Answer(HTTPStatus.OK, "application/json", json.dumps(look()).encode() + b"\n")


def served(path: str) -> str | None:
    """Why the unix socket at path is not served; None if a thread of the agent accepts and closes a connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(path)
            probe.shutdown(socket.SHUT_WR)  # the server closes a connection without a request
            probe.recv(1)
        except OSError as error:
            return f"{path}: {reason(error)}"
    return None


def _reasons(checks: Mapping[str, Check]) -> dict[str, str]:
    found = {}
    for name, check in checks.items():
        try:
            why = check()
        except (CniError, OSError) as error:
            why = reason(error)
        if why:
            found[name] = why
    return found
