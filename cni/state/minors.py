"""The minors of macvtaps of which a container may have a device node.

The kernel gives out the lowest free minor, and a container keeps the nodes and the device rules that it was started
with. So a minor must not become another pod's while such a container may run: not when the pod has deleted its link,
nor after DEL. ADD writes an entry before it makes the node; attach/minor.py heeds the entries.

    FOLDER/minors/N             a symbolic link whose target is the JSON of a Given

An entry whose pod is known stays after DEL, until the agent has seen that pod's control group end
(agent/reconcile/minors.py). Another one, of a container that no kubelet runs, ends with its attachment.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress

from cni.dataclass import dataclass
from cni.errors import CniError, reason
from cni.spec import IO_FAILURE, TRY_AGAIN_LATER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from cni.state.record import Record

MOST = 1024
"""Entries at most."""


@dataclass(frozen=True)
class Given:
    """Who may have a device node of a minor."""

    attachment: str
    """The id of the attachment whose macvtap had the minor."""
    boot_id: str
    pod: str = ""
    """The UID of the pod, or the id of its sandbox; "" if no kubelet runs the container."""
    cgroup: str = ""
    """The folder of the pod's control group; "" as long as nobody has seen it."""


class Minors:
    """The folder of the entries, below the state folder. Every method raises CniError 5 if the file system refuses."""

    def __init__(self, folder: str) -> None:
        self._folder = f"{folder}/minors"

    def all(self) -> dict[int, Given]:
        """Every entry, by minor."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._failed(error) from error
        entries = ((int(name), self.get(int(name))) for name in names if name.isdecimal())
        return {minor: given for minor, given in entries if given}

    def get(self, minor: int) -> Given | None:
        """The entry of a minor, or None."""
        try:
            return Given(*json.loads(os.readlink(f"{self._folder}/{minor}")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(error) from error
        except (ValueError, TypeError) as error:
            raise CniError(
                IO_FAILURE, f"{self._folder}/{minor} is no entry of vmtap's", reason(error)
            ) from error

    def give(self, minor: int, given: Given) -> None:
        """Write or replace the entry. Raises CniError 11 if there are MOST of others."""
        path = f"{self._folder}/{minor}"
        new = f"{path}.{given.attachment}"
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            if not os.path.lexists(path) and len(os.listdir(self._folder)) >= MOST:
                raise CniError(
                    TRY_AGAIN_LATER,
                    f"{MOST} device nodes may be in use by containers whose end was not seen; let the agent see the "
                    "host's control groups (its setting cgroup), or restart the node",
                )
            target = json.dumps([given.attachment, given.boot_id, given.pod, given.cgroup])
            with suppress(FileExistsError):
                os.symlink(target, path)
                return
            _unlink(new)
            os.symlink(target, new)
            os.rename(new, path)
        except OSError as error:
            raise self._failed(error) from error

    def remove(self, minor: int) -> None:
        """Remove the entry, if there is one."""
        try:
            _unlink(f"{self._folder}/{minor}")
        except OSError as error:
            raise self._failed(error) from error

    def detach(self, attachment: str) -> None:
        """Remove the entries of an attachment that has ended, except those that stay with a pod."""
        try:
            for name in os.listdir(self._folder) if os.path.isdir(self._folder) else []:
                if name.endswith(f".{attachment}"):  # an ADD was killed before it replaced an entry
                    _unlink(f"{self._folder}/{name}")
        except OSError as error:
            raise self._failed(error) from error
        for minor, given in self.all().items():
            if given.attachment == attachment and not given.pod:
                self.remove(minor)

    def _failed(self, error: OSError) -> CniError:
        return CniError(IO_FAILURE, f"the state under {self._folder} cannot be kept", str(error))


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def pod(arguments: Mapping[str, str], record: Record) -> str:
    """What names the pod of an attachment in an entry. arguments: CNI_ARGS."""
    if not (record.device_id or record.claim) or not arguments.get("K8S_POD_NAME"):
        return ""
    return arguments.get("K8S_POD_UID") or record.container_id
