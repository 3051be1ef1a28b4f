"""The CDI spec file of one attachment's device, by which a runtime gives the device to a container.

It has the device's numbers, so the runtime need not see the agent's file system. ADD writes it when the device is
there; the runtime reads it later, at CreateContainer. Source: the CDI specification, 0.5.0.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress

from cni.errors import CniError, reason
from cni.spec import IO_FAILURE
from cni.state import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.state.record import Record

KIND = "vmtap.dev/tap"
_VERSION = "0.5.0"


def name(device_id: str) -> str:
    """The device's qualified CDI name, which Allocate returns."""
    return f"{KIND}={device_id}"


def path(folder: str, device_id: str) -> str:
    """The path of the device's spec file. folder: of CDI specs."""
    return f"{folder}/vmtap-{device_id}.json"


def write(record: Record, device: tuple[int, int], owner: int, group: int) -> None:
    """The file that record.cdi names, whole or not at all; device: (major, minor). Raises CniError 5."""
    assert record.cdi is not None  # noqa: S101 - the caller
    node = {
        "path": f"/dev/tap{record.ifindex}",
        "type": "c",
        "major": device[0],
        "minor": device[1],
        "fileMode": 0o660,
        "permissions": "rw",
        "uid": owner,
        "gid": group,
    }
    document = {
        "cdiVersion": _VERSION,
        "kind": KIND,
        "devices": [{"name": record.device_id, "containerEdits": {"deviceNodes": [node]}}],
    }
    try:
        os.makedirs(os.path.dirname(record.cdi), exist_ok=True)
        # A runtime reads names that end with .json or .yaml only: never the temporary file.
        files.replace(record.cdi, json.dumps(document).encode(), mode=0o644)
    except OSError as error:
        remove(record.cdi)
        raise CniError(IO_FAILURE, f"the CDI spec {record.cdi} cannot be written", reason(error)) from error


def remove(path: str) -> None:
    """Remove the spec file, finished or not. Raises OSError."""
    for each in (path, f"{path}.new"):
        with suppress(FileNotFoundError):
            os.unlink(each)
