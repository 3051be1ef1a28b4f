"""Reads a page of the agent's HTTP servers."""

from __future__ import annotations

import http.client

_SECONDS = 3.0
_LIMIT = 1 << 20


def read(address: str, path: str) -> tuple[int, bytes]:
    """(status, body) of the page. address: HOST:PORT, or :PORT. Raises OSError, http.client.HTTPException."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]") or "127.0.0.1", int(port), timeout=_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(_LIMIT)
    finally:
        connection.close()
