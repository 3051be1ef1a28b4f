"""IPAM by delegation: run another CNI plugin (SPEC section 4).

Must not know what an address is for; result.py checks what the delegate has printed.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from cni.errors import CniError
from cni.kernel import netns
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

OUTPUT_LIMIT = 1 << 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGKILL = 9


@dataclass(frozen=True)
class Delegate:
    """A plugin to run. config: the whole network config; deadline: in seconds.

    yield_turn is called before each wait for it.
    """

    type: str
    config: bytes
    env: Mapping[str, str]
    deadline: float
    yield_turn: Callable[[], None] = keep_turn

    def find(self) -> str:
        """The path of the executable. Raises CniError 4 or 7 if there is none."""
        return _find(self.type, self.env.get("CNI_PATH", ""))

    def run(self, command: str, **changed: str) -> dict[str, Any] | None:
        """Run it with CNI_COMMAND=command. Returns the document that it prints for ADD, else None.

        Its stderr is this process's. Past the deadline it is killed with its process group. Raises CniError: the
        delegate's own code and message, or 109 if its code is 3, if it does not end, or ends without a CNI error.
        """
        import signal  # noqa: PLC0415 - these take 20 ms, and only a delegate needs them
        import subprocess  # noqa: PLC0415
        import threading  # noqa: PLC0415

        program = self.find()
        self.yield_turn()
        # preexec_fn is safe only in a process of one thread, as the one-shot is. An agent needs none: it is the main
        # process of a container or systemd unit, so its delegates are killed with it.
        alone = threading.active_count() == 1
        try:
            process = subprocess.Popen(
                [program],
                preexec_fn=partial(_die_with, os.getpid()) if alone else None,  # noqa: PLW1509 - alone
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**self.env, "CNI_COMMAND": command, **changed},
                start_new_session=True,
            )
        except OSError as error:
            raise CniError(
                DELEGATE_FAILED, f"ipam.type {self.type!r}: {program} cannot be run", str(error)
            ) from error
        try:
            out, _ = process.communicate(self.config, timeout=self.deadline)
        except BaseException as error:
            with suppress(ProcessLookupError):  # it is not reaped yet, so the number is still its group's
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise CniError(
                    DELEGATE_FAILED,
                    f"ipam.type {self.type!r} did not finish {command} in {self.deadline:g} s and was killed",
                ) from None
            raise
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe and not pipe.closed:
                    pipe.close()
        return self._understood(command, process.returncode, out)

    def _understood(self, command: str, status: int, out: bytes) -> dict[str, Any] | None:
        document: Any = None
        if out.strip():
            try:
                document = json.loads(out.decode("utf-8")) if len(out) <= OUTPUT_LIMIT else None
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


def _die_with(parent: int) -> None:
    """Kill this child when its parent is killed: the delegate must not lease an address after the runtime's DEL."""
    netns.libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent has been killed before prctl
        os._exit(1)


def _find(type: str, path: str) -> str:
    """The executable, from the folders of CNI_PATH only (CVE-2021-20206: a type is a name, never a path)."""
    if not type or "/" in type or "\0" in type or type in (".", ".."):
        raise CniError(
            INVALID_NETWORK_CONFIG, f"ipam.type {type!r} must be the name of a plugin, without a path"
        )
    folders = [folder for folder in path.split(os.pathsep) if folder]
    if not folders:
        raise CniError(INVALID_ENVIRONMENT, f"CNI_PATH is empty, so ipam.type {type!r} cannot be found")
    for folder in folders:
        program = os.path.join(folder, type)
        if os.path.isfile(program) and os.access(program, os.X_OK):
            return program
    raise CniError(
        INVALID_NETWORK_CONFIG, f"ipam.type {type!r} is not in CNI_PATH ({path}): install it there"
    )
