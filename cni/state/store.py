"""The node's attachments: one file for each, in a folder of mode 0700 that is on a tmpfs as a rule.

ADD writes the record before it asks the kernel for anything. So whatever is killed at any moment, DEL, GC or the
reconciler finds what is left. DEL also works without a record. Must not touch the network.

    FOLDER/lock                 byte-range locks (state/lock.py)
    FOLDER/attachments/ID.json  a record; ID names network, container and ifname; mode 0400 once its ADD has succeeded
    FOLDER/ifindex/N            a symbolic link to ID: that attachment has reserved interface index N on this host
    FOLDER/vf/PCI-ADDRESS       a symbolic link to ID: that attachment has reserved the virtual function
    FOLDER/offloads/DEVICE      a source whose offload ADD has switched on (lower/offload.py)
    FOLDER/dev/tapN             a device node that ADD was asked to make (kernel/tapdev.py)
    FOLDER/minors/N             who may have a device node of minor N (state/minors.py)
    FOLDER/holders/ID           the processes that have got fds of the attachment (agent/holders.py)
    FOLDER/elsewhere/ID         the VM of that attachment was heard from the wire (agent/handover.py)
    FOLDER/claims/UID.json      a resource claim that a kubelet has had prepared (state/claims.py)
    FOLDER/probes/SOURCE.json   the last probe of a source (state/probe_results.py)
    FOLDER/pending/NAME         a DEL that the shim left while the agent was away (shim/vmtap.c)
    FOLDER/agent, launcher      the folders of the agent's sockets
"""

from __future__ import annotations

import os
import stat
from _blake2 import blake2s  # hashlib would load OpenSSL: 5 ms of every pod's start
from contextlib import suppress

from cni.errors import CniError, reason
from cni.spec import IO_FAILURE, TRY_AGAIN_LATER
from cni.state import deviceid, files, lock
from cni.state.minors import Minors
from cni.state.record import Record, boot_id, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from contextlib import AbstractContextManager

IFINDEX_BASE = 0x10000000
"""The first interface index of an attachment, far above those that the kernel assigns by counting."""
IFINDEX_SPAN = 0x60000000
_CANDIDATES = 8
_SEALED = 0o400
"""The mode of a record whose ADD has succeeded."""
_SWEEP = "sweep"
"""Holds an index in the place of an attachment's id. No id is this: each has a dash in it."""
_prepared: dict[str, tuple[int, ...]] = {}
"""Folder → its identity and modification time when all of it was there. Removing a subfolder changes the time."""


class Store:
    """The folder. Every method raises CniError 5 if the file system refuses an operation."""

    def __init__(self, folder: str | os.PathLike[str], note: Callable[[str], None] | None = None) -> None:
        """note: called with one sentence for a person about a fault that fails no request."""
        self.folder = os.fspath(folder)
        self._note = note
        self._attachments = f"{self.folder}/attachments"
        self._ifindex = f"{self.folder}/ifindex"
        self.functions = f"{self.folder}/vf"
        self._dev = f"{self.folder}/dev"
        self.holders = f"{self.folder}/holders"
        self._elsewhere = f"{self.folder}/elsewhere"
        self.minors = Minors(self.folder)

    def node(self, ifindex: int) -> str:
        """The path of a macvtap's device node, for a launcher that opens it by path."""
        return f"{self._dev}/tap{ifindex}"

    def _path(self, id: str, suffix: str = "json") -> str:
        return f"{self._attachments}/{id}.{suffix}"

    def prepare(self) -> None:
        """Make the folder where it is missing. Refuses one of another user, and makes it private."""
        with _io(self.folder):
            with suppress(FileNotFoundError):
                if _seen(self.folder) == _prepared.get(self.folder):
                    return
            for folder in (self._attachments, self._ifindex, self._dev):
                if not os.path.isdir(folder):
                    os.makedirs(folder, mode=0o700, exist_ok=True)
            status = os.lstat(self.folder)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise CniError(
                    IO_FAILURE, f"state folder {self.folder} must be a directory of uid {os.geteuid()}"
                )
            if status.st_mode & 0o077:
                os.chmod(self.folder, 0o700)
            _prepared[self.folder] = _seen(self.folder)

    def unwritable(self) -> str | None:
        """Why a record could not be written now; None if it could."""
        try:
            self.prepare()
            with _io(self._attachments):
                os.close(os.open(self._attachments, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except CniError as error:
            return str(error)
        return None

    def locked(
        self, id: str, *, wait: bool = True, yield_turn: Callable[[], None] = lock.keep_turn
    ) -> AbstractContextManager[None]:
        """The attachment's lock; yield_turn is called before a wait for it. prepare() must have been called.

        Raises BlockingIOError if it is held and wait is false.
        """
        return lock.held(f"{self.folder}/lock", id, wait=wait, yield_turn=yield_turn)

    def save(self, record: Record, *, sealed: bool = False) -> None:
        """Write it whole or not at all."""
        path = self._path(record.id)
        with _io(path):
            files.replace(
                path, encode(record), temporary=self._path(record.id, "new"), mode=_SEALED if sealed else None
            )

    def seal(self, record: Record) -> None:
        """Mark the record as one whose ADD has succeeded, by its mode: one system call, and no second write."""
        path = self._path(record.id)
        with _io(path):
            os.chmod(path, _SEALED)

    def sealed(self, id: str) -> bool:
        """Whether the record's ADD has succeeded. If it is neither sealed nor locked, the ADD was killed."""
        path = self._path(id)
        with _io(path):
            return stat.S_IMODE(os.stat(path).st_mode) == _SEALED

    def written_ns(self, id: str) -> int | None:
        """When the record was last written, in ns by the file system's clock; None if there is no record."""
        path = self._path(id)
        with _io(path), suppress(FileNotFoundError):
            return os.stat(path).st_mtime_ns
        return None

    def load(self, id: str) -> Record | None:
        """The record, or None. A file that is no record is renamed to NAME.bad, for a person to look at."""
        path = self._path(id)
        try:
            with open(path, "rb", buffering=0) as file:
                record = decode(id, file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CniError(IO_FAILURE, f"cannot read {path}", reason(error)) from None
        except ValueError as error:
            with suppress(OSError):
                os.rename(path, self._path(id, "bad"))
            if self._note:
                self._note(f"{path} was set aside as .bad: {reason(error)}")
            return None
        if record.boot_id != boot_id():  # the folder is not on a tmpfs: a reboot has ended the attachment
            self.forget(record)
            return None
        return record

    def records(self) -> Iterator[Record]:
        """Every record."""
        for id in self.recorded():
            if record := self.load(id):
                yield record

    def of(self, container_id: str, ifname: str) -> Iterator[Record]:
        """The records of that attachment, in whatever network; a fault of the file system counts as none."""
        with suppress(CniError):
            for id in self.recorded():
                record = self.load(id) if id.startswith(f"{container_id[:12]}-") else None
                if record and (record.container_id, record.ifname) == (container_id, ifname):
                    yield record

    def recorded(self) -> list[str]:
        """The ids of all files that should be records."""
        with _io(self._attachments):
            names = os.listdir(self._attachments) if os.path.isdir(self._attachments) else []
        return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))

    def forget(self, record: Record) -> None:
        """Remove the record and all that its id has reserved, but for the index of a resource claim's device.

        Without a record this does nothing.
        """
        self.forget_id(record.id, record.ifindex, keep=record.ifindex if record.claim else 0)

    def forget_id(self, id: str, *numbers: int, keep: int = 0) -> None:
        """Remove the record of that id and all that the id has reserved, where the record may not be readable.

        numbers: interface indexes that it may have reserved besides those that are derived from the id. keep: the one
        whose reservation stays, without its device node.
        """
        with _io(self.folder):
            for suffix in ("json", "new"):
                _unlink(self._path(id, suffix))
            _unlink(f"{self.holders}/{id}")
            _unlink(f"{self._elsewhere}/{id}")
            if keep and self.reserved_by(keep) == id:
                self.remove_node(keep)
            for number in {*numbers, *_candidates(id)} - {keep}:
                self.release(number, id)
            for pci in os.listdir(self.functions) if os.path.isdir(self.functions) else []:
                self.release_function(pci, id)

    def is_elsewhere(self, id: str) -> bool:
        """Whether set_elsewhere() has marked the attachment."""
        return os.path.exists(f"{self._elsewhere}/{id}")

    def set_elsewhere(self, id: str, elsewhere: bool) -> None:
        """Mark the attachment as one whose VM runs elsewhere, or remove the mark."""
        with _io(self._elsewhere):
            if elsewhere:
                os.makedirs(self._elsewhere, mode=0o700, exist_ok=True)
                os.close(os.open(f"{self._elsewhere}/{id}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            else:
                _unlink(f"{self._elsewhere}/{id}")

    def sweep_elsewhere(self, keep: Collection[str]) -> None:
        """Remove the marks of set_elsewhere(), except those of the ids to keep."""
        with _io(self._elsewhere):
            for id in os.listdir(self._elsewhere) if os.path.isdir(self._elsewhere) else []:
                if id not in keep:
                    _unlink(f"{self._elsewhere}/{id}")

    def reserve_ifindex(self, id: str, device_id: str | None = None, claimed: int = 0) -> int:
        """Reserve an interface index that no other attachment on this host has, until forget().

        device_id: the kubelet's device, whose own index is reserved (deviceid.py). claimed: the one that a resource
        claim has reserved. Raises CniError 11 if another attachment still has it.
        """
        with _io(self._ifindex):
            if number := deviceid.index_of(device_id):
                if self.hold(number, id):
                    return number
                holder = self.reserved_by(number)
                record = self.load(holder) if holder else None
                owner = f"{record.owner}, attachment {holder}," if record else f"attachment {holder}"
                raise CniError(
                    TRY_AGAIN_LATER,
                    f"deviceID {device_id}: {owner} has it still; try again when that has ended",
                )
            for number in (claimed,) if claimed else _candidates(id):
                if self.hold(number, id):
                    return number
        raise CniError(TRY_AGAIN_LATER, "no free interface index was found; try again")

    def adopt(self, record: Record) -> bool:
        """Save a record for a link that was found without one; whether ADD could have given the link its index."""
        with _io(self._ifindex):
            ours = record.ifindex >= deviceid.BASE or record.ifindex in _candidates(record.id)
            if not ours or not self.hold(record.ifindex, record.id):
                return False
        self.save(record, sealed=True)
        if record.vf:
            self.hold_function(record.vf.pci, record.id)
        return True

    def reserved_by(self, number: int) -> str | None:
        """The id that has reserved that interface index, or None."""
        with _io(self._ifindex):
            try:
                return os.readlink(f"{self._ifindex}/{number}")
            except FileNotFoundError:
                return None

    def remove_node(self, ifindex: int) -> None:
        """Remove the device node of the attachment with that index, if there is one."""
        path = self.node(ifindex)
        with _io(self._dev):
            _unlink(path)
            _unlink(f"{path}.new")

    def sweep_nodes(self, keep: Collection[int] = ()) -> list[int]:
        """Remove device nodes whose index is not reserved, but those of the indexes to keep. Returns their indexes."""
        swept = []
        with _io(self._dev):
            for name in os.listdir(self._dev) if os.path.isdir(self._dev) else []:
                number = name.removeprefix("tap").removesuffix(".new")
                # While the sweep holds the index, no ADD can be making the node.
                if number.isdecimal() and int(number) not in keep and self.hold(int(number), _SWEEP):
                    self.release(int(number), _SWEEP)
                    swept.append(int(number))
        return swept

    def reserved(self) -> Iterator[tuple[int, str]]:
        """The reserved interface indexes, each with the id that has reserved it, with or without a record."""
        with _io(self._ifindex):
            for name in os.listdir(self._ifindex) if os.path.isdir(self._ifindex) else []:
                with suppress(FileNotFoundError, ValueError):
                    yield int(name), os.readlink(f"{self._ifindex}/{name}")

    def unfinished(self) -> list[str]:
        """The ids of records that are being written, or whose writing was killed."""
        with _io(self._attachments):
            names = os.listdir(self._attachments) if os.path.isdir(self._attachments) else []
        return [name.removesuffix(".new") for name in names if name.endswith(".new")]

    def release(self, number: int, id: str) -> None:
        """Release an interface index if that id has reserved it."""
        path = f"{self._ifindex}/{number}"
        with _io(path), suppress(FileNotFoundError):
            if os.readlink(path) == id:
                self.remove_node(
                    number
                )  # first: after a kill in between, the reservation still leads to the node
                os.unlink(path)

    def hold_function(self, pci: str, id: str) -> bool:
        """Reserve the VF of that PCI address; False if another attachment has it."""
        with _io(self.functions):
            os.makedirs(self.functions, mode=0o700, exist_ok=True)
            return _hold(f"{self.functions}/{pci}", id)

    def function_held_by(self, pci: str) -> str | None:
        """The id that has reserved the VF of that PCI address, or None."""
        with _io(self.functions), suppress(FileNotFoundError):
            return os.readlink(f"{self.functions}/{pci}")
        return None

    def functions_held(self) -> Iterator[tuple[str, str]]:
        """The PCI addresses of the reserved VFs, each with the id that has reserved it."""
        with _io(self.functions):
            for pci in os.listdir(self.functions) if os.path.isdir(self.functions) else []:
                if id := self.function_held_by(pci):
                    yield pci, id

    def release_function(self, pci: str, id: str) -> None:
        """Release the VF of that PCI address if that id has reserved it."""
        if self.function_held_by(pci) == id:
            with _io(self.functions):
                _unlink(f"{self.functions}/{pci}")

    def hold(self, number: int, id: str) -> bool:
        """Reserve that interface index; False if another id has it."""
        with _io(self._ifindex):
            return _hold(f"{self._ifindex}/{number}", id)


def _hold(path: str, id: str) -> bool:
    """Make the symbolic link to id; False if it is there and leads to another id."""
    try:
        os.symlink(id, path)
    except FileExistsError:
        with suppress(FileNotFoundError):
            return os.readlink(path) == id
        return False
    return True


def in_netns(folder: str | os.PathLike[str], netns_id: tuple[int, int]) -> list[Record]:
    """The attachments in the network namespace of that identity (netns.identity), sorted by ifname."""
    found = [record for record in Store(folder).records() if record.netns_id == netns_id]
    return sorted(found, key=lambda record: record.ifname)


def _seen(folder: str) -> tuple[int, ...]:
    status = os.lstat(folder)
    return status.st_dev, status.st_ino, status.st_mode, status.st_uid, status.st_mtime_ns


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _candidates(id: str) -> Iterator[int]:
    """The interface indexes that an attachment may have, in the order to try.

    They are derived from the id: what a killed ADD has reserved is found without a record.
    """
    digest = blake2s(id.encode(), digest_size=4 * _CANDIDATES).digest()
    for at in range(0, len(digest), 4):
        yield IFINDEX_BASE + int.from_bytes(digest[at : at + 4]) % IFINDEX_SPAN


class _io:  # noqa: N801 - used as a statement
    """Inside the block an OSError becomes a CniError 5 that names the path."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CniError(
                IO_FAILURE,
                f"the state under {self._path} cannot be kept: is its file system full or read-only?",
                str(error),
            ) from error
