"""The results of `vmtapctl probe`: does the switch behind a source reflect? One file for each source (store.py).

Must not probe: a probe sends frames, so only the administrator starts one.
"""

from __future__ import annotations

import json
import os

from cni.dataclass import dataclass
from cni.errors import refused
from cni.state import files, lock
from cni.state.record import boot_id
from cni.state.store import Store

MEND = 'turn on reflective relay (802.1Qbg, "hairpin") at the switch\'s port, or use mode bridge'
"""The next step if the switch does not reflect."""


@dataclass(frozen=True)
class Probed:
    """The last probe of a source. reflects: None if the probe could not find out."""

    source: str
    reflects: bool | None
    why: str
    """What the probe has seen, in one sentence."""
    time: str
    """ISO 8601."""
    carrier_changes: int | None
    """The source's counter of that name in sysfs. If it has changed since, the source may be on another switch."""
    boot_id: str


def load(run: str, source: str) -> Probed | None:
    """The last probe of the source in this boot; None without one, and if its file cannot be read."""
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
