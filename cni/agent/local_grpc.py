"""Loads gRPC for local sockets: without OpenSSL, which is 4 MB of an agent and which they do not need."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def load() -> None:
    """Import gRPC. It imports asyncio, which does without ssl if that import fails. Later imports of ssl work."""
    modules: dict[str, Any] = sys.modules
    absent = modules.setdefault("ssl", None) is None  # None: an import raises ModuleNotFoundError
    try:
        import grpc  # noqa: F401, PLC0415
    finally:
        if absent:
            del modules["ssl"]
