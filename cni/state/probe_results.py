"""What `vmtapctl probe` found out of the switch behind a source, kept for those who ask later: does it reflect?

    FOLDER/probes/SOURCE.json   in the state folder (state.py)

Must not probe: that sends frames, and is for the administrator to ask for.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from cni.errors import refused
from cni.state import files, lock
from cni.state.record import boot_id
from cni.state.store import Store

MEND = 'turn on reflective relay (802.1Qbg, "hairpin") at the switch\'s port, or use mode bridge'
"""What to do about a switch that does not."""


@dataclass(frozen=True)
class Probed:
    """The last probe of a source. reflects: None if it could not be found out."""

    source: str
    reflects: bool | None
    why: str
    """What was seen, in one sentence."""
    time: str
    """ISO 8601."""
    carrier_changes: int | None
    """The source's counter of that name in sysfs: another now means that the cable may lead elsewhere."""
    boot_id: str


def load(run: str, source: str) -> Probed | None:
    """None if this boot has seen no probe of it, or what is there cannot be understood."""
    try:
        with open(_path(run, source), "rb") as file:
            found = Probed(**json.load(file))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return found if found.boot_id == boot_id() else None


def save(run: str, found: Probed) -> None:
    """Write it whole or not at all. Raises CniError 5."""
    Store(run).prepare()
    path = _path(run, found.source)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with lock.held(f"{run}/lock", path):  # two at once have one name to write to
            files.replace(path, json.dumps(vars(found)).encode())
    except OSError as error:
        raise refused(error, f"the result cannot be kept in {path}") from error


def _path(run: str, source: str) -> str:
    return f"{run}/probes/{source}.json"
