"""Installs the shim in a container runtime's CNI folder, and removes it, with the node's state if wanted.

A runtime may execute the file at any moment, also while it is replaced: it finds the old one or the new one, whole.
What is not the shim is never removed, whatever its name. Must not end what is attached.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from errno import EBUSY, ENOTEMPTY
from pathlib import Path

import cni
from cni.agent.deviceplugin.sockets import sweep
from cni.agent.health import served
from cni.config.claim import DRIVER
from cni.ctl import snapshot
from cni.errors import CniError
from cni.lower import offload
from cni.spec import IO_FAILURE, TRY_AGAIN_LATER
from cni.state.cdi import CLAIM_KIND, KIND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAMES = ("vmtap", "macvtap", "vmtap-hook")
"""The plugin's own name, and that of kubevirt/macvtap-cni, by which network configs call it; and the hook's, by which
containers with a device of a resource claim do.
"""
_SHIM = Path(cni.__file__).with_name("shim") / "vmtap"
_MARK = b"a CNI plugin that puts a VM on a NIC"
"""A byte string that every version of the shim contains (cni/shim/vmtap.c)."""
_LARGEST = 1 << 22
_PREFIX = ".vmtap-shim-"
"""The prefix of a file that is being written. No runtime looks for such a name."""


def install(folder: str, names: Sequence[str]) -> Iterator[str]:
    """Install the shim in the folder under each of the names. Yields a line for each step. CniError 5, OSError."""
    try:
        shim = _SHIM.read_bytes()
    except FileNotFoundError as error:
        why = f"{_SHIM} is not there: this package was built with VMTAP_NO_SHIM=1"
        raise CniError(IO_FAILURE, why) from error
    os.makedirs(folder, exist_ok=True)
    for name in names:
        path = f"{folder}/{name}"
        had = os.path.lexists(path)
        if had and _shim(path) == shim and os.stat(path).st_mode & 0o7777 == 0o755:
            yield f"{path} is up to date"
            continue
        _write(folder, path, shim)
        yield f"{path} is {'replaced' if had else 'installed'}"


def uninstall(folder: str, run: str, cdi: str, kubelet: str, *, state: bool, force: bool) -> Iterator[str]:
    """Remove the shim under its names, and the state if wanted. Yields a line for each step.

    kubelet: its folder of device plugins, beside which are those of drivers.

    Unless force: raises CniError 11 while a pod is attached, which could not be deleted without the shim; and while an
    agent runs whose state is to go.
    """
    if not force:
        _unused(run, state=state)
    for name in NAMES:
        if _shim(f"{folder}/{name}") is not None:
            os.unlink(f"{folder}/{name}")
            yield f"{folder}/{name} is removed"
    for path in Path(folder).glob(f"{_PREFIX}*"):  # what killed installations left
        path.unlink(missing_ok=True)
    if not state:
        return
    for each in sorted(Path(cdi).glob("vmtap-*.json*")):
        if any(kind.encode() in each.read_bytes() for kind in (KIND, CLAIM_KIND)):
            each.unlink()
            yield f"{each} is removed"
    yield from _driver(os.path.dirname(kubelet.rstrip("/")))
    for source in offload.restore(run):
        yield f"{offload.FEATURE} of {source} is off, as before ADD"
    if not os.path.isdir(run):
        return
    if mounts := _remove(os.path.realpath(run)):
        yield f"{run} is removed, except for mount points: {', '.join(mounts)}"
        return
    if os.path.islink(run):
        os.unlink(run)
    yield f"{run} is removed"


def _driver(kubelet: str) -> Iterator[str]:
    """Remove what killed drivers of resource claims left in the kubelet's folders, and the driver's own folder."""
    sweep(f"{kubelet}/plugins_registry", f"{DRIVER}-")
    folder = f"{kubelet}/plugins/{DRIVER}"
    sweep(folder, "dra-")
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (EBUSY, ENOTEMPTY):  # a mount point; of a driver that runs
            raise
        return
    yield f"{folder} is removed"


def _remove(folder: str) -> list[str]:
    """Remove a folder and its contents. Returns the mount points in it (or itself), which stay. Raises OSError.

    The content of a mount point is removed, too.
    """
    mounts: list[str] = []

    def failed(_: object, path: str, raised: tuple[object, BaseException, object]) -> None:
        error = raised[1]
        code = error.errno if isinstance(error, OSError) else None
        if code == EBUSY:  # rmdir(2), unlink(2): of a mount point
            mounts.append(path)
        elif code != ENOTEMPTY or not any(each.startswith(f"{path}/") for each in mounts):
            raise error

    shutil.rmtree(folder, onerror=failed)
    return mounts


def _unused(run: str, *, state: bool) -> None:
    if living := snapshot.living(run):
        pods = ", ".join(sorted({each.sandbox for each in living})[:5])
        raise CniError(
            TRY_AGAIN_LATER,
            f"pods are attached ({pods}), and cannot be deleted without the shim: delete them first, or use --force",
        )
    if state and served(f"{run}/agent/cni.sock") is None:
        why = f"an agent runs on {run}: stop it first, or use --force"
        raise CniError(TRY_AGAIN_LATER, why)


def _shim(path: str) -> bytes | None:
    """The content of the file, if it is a shim."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # it is not there; a link (the plugin without an agent, say), a socket …
        return None
    with open(fd, "rb") as file:
        try:
            found = file.read(_LARGEST)
        except OSError:
            return None
    return found if _MARK in found else None


def _write(folder: str, path: str, content: bytes) -> None:
    """Write the file completely, to the disk, before it gets its name."""
    fd, part = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, 0o755)
            file.flush()
            os.fsync(fd)
        os.rename(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise
    above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(above)
    finally:
        os.close(above)
