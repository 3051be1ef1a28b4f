"""The CDI spec files, by which a runtime gives devices to containers. Source: the CDI specification, 0.5.0.

Of an attachment with a device of the kubelet's: ADD writes it when the device is there, with the device's numbers, so
the runtime need not see the agent's file system. The runtime reads it later, at CreateContainer.

Of a resource claim: Prepare writes it before there is a sandbox, with the numbers of /dev/null. The attach writes those
of the links, and their end takes them out. A runtime caches the file until it changes, and with a node's path also what
it has seen there (fillMissingInfo of container-device-interface): so the numbers are in the file. The hook, which asks
the agent whether the sandbox has the claim's links, fails a container that was created with other numbers.
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
_NULL = (1, 3)
"""(major, minor) of /dev/null, for a device that is not attached: without numbers a runtime looks for a node."""
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
    edits = {"deviceNodes": [node]}
    try:
        _write(record.cdi, {"kind": KIND, "devices": [{"name": record.device_id, "containerEdits": edits}]})
    except CniError:
        remove(record.cdi)
        raise


def claim_name(uid: str, number: int) -> str:
    """The qualified CDI name of a claim's device, which NodePrepareResources returns. number: in claim.devices."""
    return f"{CLAIM_KIND}={uid}-{number}"


def claim_path(folder: str, uid: str) -> str:
    """The path of the claim's spec file. folder: of CDI specs."""
    return f"{folder}/vmtap-claim-{uid}.json"


def write_claim(
    folder: str, claim: Claim, mounts: Mapping[int, tuple[str, str]], hook: str, run: str
) -> None:
    """The claim's file, whole or not at all. A file that is there keeps its devices' numbers. Raises CniError 5.

    mounts: number of a device → (a file on the node, its path in the container). hook: the path of vmtap-hook on the
    node, which runs once in each container that gets one of the devices. run: the state folder, where it looks for the
    agent.
    """
    path = claim_path(folder, claim.uid)
    before = {each["path"]: _numbers(each) for each in _nodes(_read(path))}
    devices = []
    for number, each in enumerate(claim.devices):
        node = _node(each.ifindex, each.config["owner"], each.config["group"])
        major, minor = before.get(node["path"], _NULL)
        edits: dict[str, Any] = {"deviceNodes": [node | {"major": major, "minor": minor}]}
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
            "env": [f"VMTAP_RUN={run}"],  # with it, a runtime passes nothing of its own environment
            "timeout": _HOOK_SECONDS,
        }
    ]
    _write(path, {"kind": CLAIM_KIND, "devices": devices, "containerEdits": {"hooks": hooks}})


def set_devices(folder: str, uid: str, devices: Mapping[str, tuple[int, int] | None]) -> None:
    """Write the (major, minor) of a claim's devices, by their path in a container, into its file. Raises CniError 5.

    None: the device is not attached. A file that is missing stays so.
    """
    path = claim_path(folder, uid)
    document = _read(path)
    changed = False
    for node in _nodes(document):
        if node["path"] in devices:
            numbers = devices[node["path"]] or _NULL
            changed |= _numbers(node) != numbers
            node["major"], node["minor"] = numbers
    if changed:
        _write(path, document)


def _read(path: str) -> dict[str, Any]:
    """A claim's file; {} without one. Raises CniError 5."""
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read())
        return document if isinstance(document, dict) else {}
    except FileNotFoundError:
        return {}
    except ValueError:  # not whole: it is written anew
        return {}
    except OSError as error:
        raise CniError(IO_FAILURE, f"the CDI spec {path} cannot be read", reason(error)) from error


def _numbers(node: Mapping[str, Any]) -> tuple[int, int]:
    return node.get("major", _NULL[0]), node.get("minor", _NULL[1])


def _nodes(document: dict[str, Any]) -> list[dict[str, Any]]:
    devices = document.get("devices", ())
    return [node for each in devices for node in each["containerEdits"].get("deviceNodes", ())]


def _node(ifindex: int, owner: int, group: int) -> dict[str, Any]:
    return {
        "path": f"/dev/tap{ifindex}",
        "type": "c",
        "fileMode": 0o660,
        "permissions": "rw",
        "uid": owner,
        "gid": group,
    }


def _write(path: str, fields: Mapping[str, Any]) -> None:
    document = {"cdiVersion": _VERSION, **fields}
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # A runtime reads names that end with .json or .yaml only: never the temporary file.
        files.replace(path, json.dumps(document).encode(), mode=0o644)
    except OSError as error:
        raise CniError(IO_FAILURE, f"the CDI spec {path} cannot be written", reason(error)) from error


def remove(path: str) -> None:
    """Remove the spec file, finished or not. Raises OSError."""
    for each in (path, f"{path}.new"):
        with suppress(FileNotFoundError):
            os.unlink(each)
