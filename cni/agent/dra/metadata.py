"""Files in which a container finds what its claim was allocated (KEP-5304, device metadata).

    RUN/metadata/UID/REQUEST.json, mounted by CDI at
    /var/run/kubernetes.io/dra-device-attributes/resourceclaims/CLAIM/REQUEST/vmtap.dev-metadata.json, or at
    …/resourceclaimtemplates/NAME IN THE POD/… where the claim was made of a template

Prepare writes them with the devices' attributes. The attach adds the interface's name, MAC and addresses, before the
containers start. It writes in place, as a container's mount is of the file, not of its name.
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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from cni.state.claims import Claim
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

        document: the ResourceClaim. attributes: of the devices, by name, as in a ResourceSlice.
        """
        in_pod = pod_claim(document)
        place = f"resourceclaimtemplates/{in_pod}" if in_pod else f"resourceclaims/{claim.name}"
        bases = [each.request.partition("/")[0] for each in claim.devices]
        mounts = {}
        for base in dict.fromkeys(bases):
            requests: dict[str, list[dict[str, Any]]] = {}
            for each in claim.devices:
                if each.request.partition("/")[0] == base:
                    device: dict[str, Any] = {"driver": DRIVER, "pool": each.pool, "name": each.device}
                    if found := attributes.get(each.device):
                        device["attributes"] = found
                    requests.setdefault(each.request, []).append(device)
            path = self._path(claim.uid, base)
            file = {
                "apiVersion": _VERSION,
                "kind": "DeviceMetadata",
                "metadata": {
                    "name": claim.name,
                    "namespace": claim.namespace,
                    "uid": claim.uid,
                    "generation": _generation(path) + 1,
                },
                **({"podClaimName": in_pod} if in_pod else {}),
                "requests": [{"name": name, "devices": devices} for name, devices in requests.items()],
            }
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                _write(path, file)
            except OSError as error:
                raise _failed(path, error) from error
            mounts[bases.index(base)] = (path, f"{_INSIDE}/{place}/{base}/{DRIVER}-metadata.json")
        return mounts

    def attached(self, claim: Claim, records: Sequence[Record]) -> None:
        """Add what is known since the attach. A file that is missing stays so, and one that has it already."""
        network = {
            (each.pool, each.device): record
            for each in claim.devices
            for record in records
            if record.id == claim.attachment(each)
        }
        for base in {each.request.partition("/")[0] for each in claim.devices}:
            path = self._path(claim.uid, base)
            try:
                with open(path, encoding="utf-8") as file:
                    document = json.load(file)
                changed = False
                for request in document["requests"]:
                    for device in request["devices"]:
                        record = network.get((device["pool"], device["name"]))
                        if record and (now := device | _since_attach(record, device)) != device:
                            device.update(now)
                            changed = True
                if changed:  # a container may be reading it
                    document["metadata"]["generation"] += 1
                    _write(path, document)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise _failed(path, error) from error

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


def _since_attach(record: Record, device: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a device in a file that the attach decides: of a VF, the address is that of the one taken."""
    found: dict[str, Any] = {"networkData": network_data(record)}
    if record.vf:
        found["attributes"] = device.get("attributes", {}) | {PCI: {"string": record.vf.pci}}
    return found


def _generation(path: str) -> int:
    """The generation of the file that is there; 0 if there is none."""
    with suppress(OSError, ValueError, TypeError, KeyError), open(path, encoding="utf-8") as file:
        return int(json.load(file)["metadata"]["generation"])
    return 0


def _write(path: str, document: Mapping[str, Any]) -> None:
    data = json.dumps(document).encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        os.fchmod(fd, 0o644)  # whatever the umask is: the container's user reads it
        if os.write(fd, data) < len(data):
            raise OSError("the file system is full")
    finally:
        os.close(fd)


def _failed(path: str, error: Exception) -> CniError:
    return CniError(IO_FAILURE, f"the device metadata in {path} cannot be written", reason(error))
