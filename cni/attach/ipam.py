"""IPAM by delegation: run another CNI plugin (SPEC section 4).

Must not know what an address is for; result.py checks what the delegate has printed.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress

from cni.dataclass import dataclass
from cni.errors import CniError, reason
from cni.kernel.execute import execute
from cni.names import escaped
from cni.spec import (
    DECODING_FAILURE,
    DELEGATE_FAILED,
    INVALID_ENVIRONMENT,
    INVALID_NETWORK_CONFIG,
    UNKNOWN_CONTAINER,
)
from cni.state.lock import keep_turn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

OUTPUT_LIMIT = 1 << 18
OWN_NAMES = ("vmtap", "macvtap")
DELEGATED = "VMTAP_DELEGATED"
"""A variable of each delegate's environment, by which vmtap knows that it is one, and refuses."""


def print_stderr(text: str) -> None:
    """Print what a delegate wrote to stderr on this process's, with what is unprintable in it escaped."""
    with suppress(OSError):  # nobody reads it
        os.write(2, escaped(text, kept="\n").encode())


@dataclass(frozen=True)
class Delegate:
    """A plugin to run. config: the whole network config; deadline: in seconds.

    yield_turn is called before each wait for it, and stderr with what it wrote there.
    """

    type: str
    config: bytes
    env: Mapping[str, str]
    deadline: float
    yield_turn: Callable[[], None] = keep_turn
    stderr: Callable[[str], None] = print_stderr

    def find(self) -> str:
        """The path of the executable. Raises CniError 4 or 7 if there is none, or if it is vmtap itself."""
        if self.ourselves():
            raise CniError(
                INVALID_NETWORK_CONFIG,
                f"ipam.type {self.type!r} is vmtap itself; give an IPAM plugin, such as host-local",
            )
        return _find(self.type, self._path)

    def installed(self) -> bool:
        """Whether CNI_PATH has the executable; False without a CNI_PATH."""
        try:
            _find(self.type, self._path)
        except CniError:
            return False
        return True

    def ourselves(self) -> bool:
        """Whether the executable is vmtap, under whatever name: it would run itself for ever.

        A copy under another name is not found here; DELEGATED stops it.
        """
        if self.type in OWN_NAMES:
            return True
        try:
            program = _find(self.type, self._path)
            found = os.stat(program)
        except (CniError, OSError):
            return False
        if os.path.basename(os.path.realpath(program)) in OWN_NAMES:
            return True
        for folder in _folders(self._path):
            for name in OWN_NAMES:
                with suppress(OSError):
                    if os.path.samestat(found, os.stat(os.path.join(folder, name))):
                        return True
        return False

    @property
    def _path(self) -> str:
        return self.env.get("CNI_PATH", "")

    def run(self, command: str) -> dict[str, Any] | None:
        """Run it with CNI_COMMAND=command. Returns the document that it prints for ADD, else None.

        Past the deadline, or after too much output, it is killed with all that it started. Raises CniError: the
        delegate's own code and message, or 109 if its code is 3, if it is killed, or ends without a CNI error.
        """
        if command in ("DEL", "GC") and self.ourselves():
            return None  # no ADD of it has succeeded, and the pod must be deleted
        program = self.find()
        self.yield_turn()
        env = {**self.env, "CNI_COMMAND": command, DELEGATED: "1"}
        try:
            done = execute(program, self.config, env, seconds=self.deadline, most=OUTPUT_LIMIT)
        except OSError as error:
            raise CniError(
                DELEGATE_FAILED, f"ipam.type {self.type!r}: {program} cannot be run", reason(error)
            ) from error
        if done.err:
            self.stderr(done.err.decode(errors="backslashreplace"))
        if done.flooded:
            raise CniError(
                DELEGATE_FAILED,
                f"ipam.type {self.type!r} printed more than {OUTPUT_LIMIT >> 10} KiB for {command} and was killed",
            )
        if done.late:
            raise CniError(
                DELEGATE_FAILED,
                f"ipam.type {self.type!r} did not finish {command} in {self.deadline:g} s and was killed",
            )
        return self._understood(command, done.status, done.out)

    def _understood(self, command: str, status: int, out: bytes) -> dict[str, Any] | None:
        document: Any = None
        if out.strip():
            try:
                document = json.loads(out.decode("utf-8"))
            except (ValueError, RecursionError):
                document = None
        if status != 0:
            said = document if isinstance(document, dict) else {}
            code, msg = said.get("code"), said.get("msg")
            if isinstance(code, int) and code > 0 and isinstance(msg, str):
                if (
                    code == UNKNOWN_CONTAINER
                ):  # by this code a plugin tells the runtime that DEL is not needed
                    code = DELEGATE_FAILED
                raise CniError(code, f"ipam.type {self.type!r}: {msg}", str(said.get("details") or ""))
            raise CniError(
                DELEGATE_FAILED,
                f"ipam.type {self.type!r} failed {command} with status {status} and no CNI error",
                out[:200].decode(errors="replace"),
            )
        if command != "ADD":
            return None
        if not isinstance(document, dict):
            raise CniError(
                DECODING_FAILURE,
                f"ipam.type {self.type!r} printed something that is no CNI result",
                out[:200].decode(errors="replace"),
            )
        return document


def _folders(path: str) -> list[str]:
    return [folder for folder in path.split(os.pathsep) if folder]


def _find(type: str, path: str) -> str:
    """The executable, from the folders of CNI_PATH only (CVE-2021-20206: a type is a name, never a path)."""
    if not type or "/" in type or "\0" in type or type in (".", ".."):
        raise CniError(
            INVALID_NETWORK_CONFIG, f"ipam.type {type!r} must be the name of a plugin, without a path"
        )
    folders = _folders(path)
    if not folders:
        raise CniError(INVALID_ENVIRONMENT, f"CNI_PATH is empty, so ipam.type {type!r} cannot be found")
    for folder in folders:
        program = os.path.join(folder, type)
        if os.path.isfile(program) and os.access(program, os.X_OK):
            return program
    raise CniError(
        INVALID_NETWORK_CONFIG, f"ipam.type {type!r} is not in CNI_PATH ({path}): install it there"
    )
