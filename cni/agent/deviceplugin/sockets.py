"""Sockets of agents that have ended: in a kubelet's folder, a killed agent leaves its own."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress


def sweep(folder: str, prefix: str) -> None:
    """Remove the sockets in the folder whose names begin so and on which nobody listens."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder):
            path = f"{folder}/{name}"
            if name.startswith(prefix) and stat.S_ISSOCK(os.lstat(path).st_mode) and _dead(path):
                os.unlink(path)


def _dead(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False
