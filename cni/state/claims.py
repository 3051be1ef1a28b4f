"""The resource claims that a kubelet has had prepared on this node (Dynamic Resource Allocation), a file for each.

NodePrepareResources writes the file before the pod's sandbox exists, and NodeUnprepareResources removes it after the
sandbox has ended. Each device becomes an attachment by an ordinary ADD: its network is the config's name, its container
id the claim's UID. So its id, and the interface index that is derived from the id, stay when the sandbox is made again.
The id also reserves the index of a device that the device plugin offers (deviceid.py), as its share of the capacity.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress

from cni.dataclass import dataclass
from cni.errors import CniError, reason
from cni.names import is_id, is_ifname
from cni.spec import IO_FAILURE
from cni.state import files
from cni.state.record import identifier, known

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_JSON = json.JSONEncoder(separators=(",", ":"), default=vars)
_MOST = 1 << 20
"""Bytes of a file. A claim has at most 32 devices, and 10 KiB of parameters for each (resource.k8s.io/v1)."""


@dataclass(frozen=True)
class ClaimDevice:
    """One allocated device of a claim, and the ADD that attaches it."""

    request: str
    """The name of the request, "REQUEST/SUBREQUEST" where the request lists alternatives."""
    device: str
    """The device's name in the ResourceSlice."""
    pool: str
    share: str
    """The share id of a device that allows several allocations; "" without one."""
    ifname: str
    ifindex: int
    """The interface index that Prepare has reserved for the attachment."""
    mac: str | None
    """The guest's MAC, by the parameters or by the pod's annotation; None: ADD derives it."""
    config: dict[str, Any]
    """The network config, with cniVersion, name and type."""
    args: str
    """CNI_ARGS: IgnoreUnknown, and the pod's namespace, name and UID."""
    function: str = ""
    """The PCI address of the device, if it is a virtual function that is there. ADD takes another one if it is not
    free."""

    @property
    def network(self) -> str:
        """The name of the network config."""
        return str(self.config["name"])


@dataclass(frozen=True)
class Claim:
    """A prepared claim, and the one pod that it is reserved for."""

    uid: str
    namespace: str
    name: str
    pod_uid: str
    pod_name: str
    devices: tuple[ClaimDevice, ...]
    in_pod: str = ""
    """The claim's name in the pod, where it was made of a template."""

    def attachment(self, device: ClaimDevice) -> str:
        """The id of the device's attachment, which names its record."""
        return identifier(device.network, self.uid, device.ifname)


class Claims:
    """The folder FOLDER/claims. Every method raises CniError 5 if the file system refuses an operation.

    Two that write one claim at once need a lock; a reader needs none.
    """

    def __init__(self, folder: str | os.PathLike[str], note: Callable[[str], None] | None = None) -> None:
        """folder: the state folder. note: called with one sentence about a fault that fails no request."""
        self._folder = f"{os.fspath(folder)}/claims"
        self._note = note

    def save(self, claim: Claim) -> None:
        """Write it whole or not at all."""
        path = self._path(claim.uid)
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            files.replace(path, _JSON.encode(vars(claim)).encode())
        except OSError as error:
            raise _failed(path, error) from error

    def load(self, uid: str) -> Claim | None:
        """The claim, or None. A file that is no claim is renamed to UID.bad, for a person to look at."""
        path = self._path(uid)
        try:
            with open(path, "rb") as file:
                return decode(uid, file.read(_MOST + 1))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed(path, error) from error
        except ValueError as error:
            with suppress(OSError):
                os.rename(path, f"{self._folder}/{uid}.bad")
            if self._note:
                self._note(f"{path} was set aside as .bad: {reason(error)}")
            return None

    def remove(self, uid: str) -> None:
        """Remove the claim, finished or not; without one this does nothing."""
        path = self._path(uid)
        for each in (path, f"{path}.new", f"{self._folder}/{uid}.bad"):
            try:
                os.unlink(each)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _failed(path, error) from error

    def all(self) -> list[Claim]:
        """Every claim, sorted by UID."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _failed(self._folder, error) from error
        uids = sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))
        return [claim for uid in uids if is_id(uid) and (claim := self.load(uid))]

    def reserved(self) -> dict[str, int]:
        """The interface indexes that claims have reserved, by the attachment's id."""
        return {claim.attachment(each): each.ifindex for claim in self.all() for each in claim.devices}

    def of_pod(self, pod_uid: str) -> list[Claim]:
        """The claims that are prepared for the pod of that UID, sorted by UID."""
        return [claim for claim in self.all() if claim.pod_uid == pod_uid]

    def _path(self, uid: str) -> str:
        if not is_id(uid):
            raise CniError(IO_FAILURE, f"{uid!r} is not the UID of a claim")
        return f"{self._folder}/{uid}.json"


def decode(uid: str, data: bytes) -> Claim:
    """The claim in the file of that UID. Raises ValueError if it cannot be understood."""
    try:
        if len(data) > _MOST:
            raise ValueError(f"it has more than {_MOST} bytes")
        document = json.loads(data)
        devices = tuple(_device(each) for each in document.pop("devices"))
        claim = known(Claim, document, devices=devices)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no claim: {reason(error)}") from None
    if claim.uid != uid or not is_id(uid):
        raise ValueError("its name is another claim's")
    return claim


def _device(document: dict[str, Any]) -> ClaimDevice:
    device = known(ClaimDevice, document)
    network = device.config.get("name")
    if not (isinstance(network, str) and is_id(network) and is_ifname(device.ifname)):
        raise ValueError("a device's config has no name, or its ifname cannot be one")
    return device


def _failed(path: str, error: OSError) -> CniError:
    return CniError(IO_FAILURE, f"the claim in {path} cannot be kept or read", reason(error))
