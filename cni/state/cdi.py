"""The CDI spec files, by which a runtime gives devices to containers. Source: the CDI specification, 0.5.0.

Of an attachment with a device of the kubelet's: ADD writes it when the device is there, with the device's numbers, so
the runtime need not see the agent's file system. The runtime reads it later, at CreateContainer.

Of a resource claim: Prepare writes it before there is a sandbox. It names the device nodes that ADD makes on the node,
and the runtime looks at them at CreateContainer. Its hook asks the agent whether the sandbox has the claim's devices.
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
    from collections.abc import Mapping
    from typing import Any

    from cni.state.claims import Claim
    from cni.state.record import Record

KIND = "vmtap.dev/tap"
CLAIM_KIND = "vmtap.dev/claim"
_HOOK_SECONDS = 30
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
    node = _node(record.ifindex, owner, group) | {"major": device[0], "minor": device[1]}
    _write(record.cdi, KIND, [{"name": record.device_id, "containerEdits": {"deviceNodes": [node]}}])


def claim_name(uid: str, number: int) -> str:
    """The qualified CDI name of a claim's device, which NodePrepareResources returns. number: in claim.devices."""
    return f"{CLAIM_KIND}={uid}-{number}"


def claim_path(folder: str, uid: str) -> str:
    """The path of the claim's spec file. folder: of CDI specs."""
    return f"{folder}/vmtap-claim-{uid}.json"


def write_claim(
    folder: str, claim: Claim, nodes: Mapping[int, str], mounts: Mapping[int, tuple[str, str]], hook: str
) -> None:
    """The claim's file, whole or not at all. Raises CniError 5.

    nodes: interface index → path of the device node on the node. mounts: number of a device → (a file on the node, its
    path in the container). hook: the path of vmtap-hook on the node, which runs once in each container that gets one of
    the devices.
    """
    devices = []
    for number, each in enumerate(claim.devices):
        node = _node(each.ifindex, each.config["owner"], each.config["group"])
        edits: dict[str, Any] = {"deviceNodes": [node | {"hostPath": nodes[each.ifindex]}]}
        if number in mounts:
            source, target = mounts[number]
            options = ["ro", "nosuid", "nodev", "noexec", "bind"]
            edits["mounts"] = [{"hostPath": source, "containerPath": target, "options": options}]
        devices.append({"name": f"{claim.uid}-{number}", "containerEdits": edits})
    hooks = [
        {
            "hookName": "createRuntime",
            "path": hook,
            "args": ["vmtap-hook", claim.uid],
            "timeout": _HOOK_SECONDS,
        }
    ]
    _write(claim_path(folder, claim.uid), CLAIM_KIND, devices, {"containerEdits": {"hooks": hooks}})


def _node(ifindex: int, owner: int, group: int) -> dict[str, Any]:
    return {
        "path": f"/dev/tap{ifindex}",
        "type": "c",
        "fileMode": 0o660,
        "permissions": "rw",
        "uid": owner,
        "gid": group,
    }


def _write(
    path: str, kind: str, devices: list[dict[str, Any]], more: Mapping[str, Any] | None = None
) -> None:
    document = {"cdiVersion": _VERSION, "kind": kind, "devices": devices, **(more or {})}
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # A runtime reads names that end with .json or .yaml only: never the temporary file.
        files.replace(path, json.dumps(document).encode(), mode=0o644)
    except OSError as error:
        remove(path)
        raise CniError(IO_FAILURE, f"the CDI spec {path} cannot be written", reason(error)) from error


def remove(path: str) -> None:
    """Remove the spec file, finished or not. Raises OSError."""
    for each in (path, f"{path}.new"):
        with suppress(FileNotFoundError):
            os.unlink(each)
