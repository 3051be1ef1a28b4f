"""Files in which a container finds what its claim was allocated (KEP-5304, device metadata).

    RUN/metadata/UID/REQUEST.json, mounted by CDI at
    /var/run/kubernetes.io/dra-device-attributes/resourceclaims/CLAIM/REQUEST/vmtap.dev-metadata.json, or at
    …/resourceclaimtemplates/NAME IN THE POD/… where the claim was made of a template

Prepare writes them with the devices' attributes. The attach adds the interface's name, MAC and addresses, before the
containers start.

A file is replaced, never changed, so that a reader sees all of it. A container has a mount of the file, and not of the
folder, in which other drivers may have files of the same request: so it keeps the file that was there when it was
created, and the hook fails a container that was created before the attach (sandbox.py). Writing in place would be seen
in the mount, but no write(2) is atomic for a reader, and the agent may be killed in it.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress

from cni.agent.dra.slices import PCI
from cni.config.claim import DRIVER, pod_claim
from cni.errors import CniError, reason
from cni.spec import IO_FAILURE
from cni.state import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from cni.state.claims import Claim, ClaimDevice
    from cni.state.record import Record

_INSIDE = "/var/run/kubernetes.io/dra-device-attributes"
_VERSION = "metadata.resource.k8s.io/v1alpha1"


class Metadata:
    """The folder of the files. run: the state folder. Methods raise CniError 5 if the file system refuses."""

    def __init__(self, run: str) -> None:
        self._folder = f"{run}/metadata"

    def write(
        self, claim: Claim, document: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> dict[int, tuple[str, str]]:
        """Write a claim's files. Returns, for the first device of each request, (the file, its path in a container).

        A file that is there keeps what the attach has added. document: the ResourceClaim. attributes: of the devices,
        by name, as in a ResourceSlice.
        """
        in_pod = pod_claim(document)
        place = f"resourceclaimtemplates/{in_pod}" if in_pod else f"resourceclaims/{claim.name}"
        mounts = {}
        for base, ours in _files(claim).items():
            path = self._path(claim.uid, base)
            before = _read(path)
            there = _devices(before)
            requests: dict[str, list[dict[str, Any]]] = {}
            for number, each in enumerate(ours):
                device: dict[str, Any] = {"driver": DRIVER, "pool": each.pool, "name": each.device}
                if found := attributes.get(each.device):
                    device["attributes"] = found
                if number < len(there) and "networkData" in there[number]:
                    device["networkData"] = there[number]["networkData"]
                requests.setdefault(each.request, []).append(device)
            file = {
                "apiVersion": _VERSION,
                "kind": "DeviceMetadata",
                "metadata": {
                    "name": claim.name,
                    "namespace": claim.namespace,
                    "uid": claim.uid,
                    "generation": before["metadata"]["generation"] if before else 0,
                },
                **({"podClaimName": in_pod} if in_pod else {}),
                "requests": [{"name": name, "devices": devices} for name, devices in requests.items()],
            }
            if file != before:
                _write(path, file)
            first = claim.devices.index(ours[0])
            mounts[first] = (path, f"{_INSIDE}/{place}/{base}/{DRIVER}-metadata.json")
        return mounts

    def attached(self, claim: Claim, records: Sequence[Record]) -> bool:
        """Add what is known since the attach. Returns whether a file was replaced. A file that is missing stays so."""
        attached = {record.id: record for record in records}
        replaced = False
        for base, ours in _files(claim).items():
            path = self._path(claim.uid, base)
            document = _read(path)
            changed = False
            for device, each in zip(_devices(document), ours, strict=False):
                record = attached.get(claim.attachment(each))
                if record and (now := device | _since_attach(record, device)) != device:
                    device.update(now)
                    changed = True
            if document and changed:
                _write(path, document)
                replaced = True
        return replaced

    def remove(self, uid: str) -> None:
        """Remove a claim's files."""
        path = f"{self._folder}/{uid}"
        with suppress(FileNotFoundError):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise _failed(path, error) from error

    def _path(self, uid: str, request: str) -> str:
        return f"{self._folder}/{uid}/{request}.json"


def network_data(record: Record) -> dict[str, Any]:
    """The networkData of an attachment (resource.k8s.io/v1, NetworkDeviceData)."""
    ips = list(dict.fromkeys(str(each["address"]) for each in record.ips if each.get("address")))
    return {
        "interfaceName": record.ifname,
        "hardwareAddress": record.mac,
        **({"ips": ips} if ips else {}),
    }


def _files(claim: Claim) -> dict[str, list[ClaimDevice]]:
    """The claim's devices by file: the name of the request, without that of a subrequest, of which it has one."""
    found: dict[str, list[ClaimDevice]] = {}
    for each in claim.devices:
        found.setdefault(each.request.partition("/")[0], []).append(each)
    return found


def _since_attach(record: Record, device: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a device in a file that the attach decides: of a VF, the address is that of the one taken."""
    found: dict[str, Any] = {"networkData": network_data(record)}
    if record.vf:
        found["attributes"] = device.get("attributes", {}) | {PCI: {"string": record.vf.pci}}
    return found


def _read(path: str) -> dict[str, Any] | None:
    """The file; None if there is none, or none that write() has made. Raises CniError 5."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failed(path, error) from error
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _devices(document: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [device for request in (document or {"requests": ()})["requests"] for device in request["devices"]]


def _write(path: str, document: dict[str, Any]) -> None:
    """Replace the file, or make it, with the next generation. Raises CniError 5."""
    document["metadata"]["generation"] += 1
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        files.replace(path, json.dumps(document).encode(), mode=0o644)  # the container's user reads it
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: str, error: Exception) -> CniError:
    return CniError(IO_FAILURE, f"the device metadata in {path} cannot be written", reason(error))
