"""The node's current policy: the policy file, and DP_MACVTAP_CONF, the variable of kubevirt/macvtap-cni.

The file is read again when it changes. If the new one is invalid, or the file is gone, the last good one stays in
force, and none of them is none: a file that was there never comes to mean "no restriction". If file and variable have
an entry of one name, the file's entry is used.
"""

from __future__ import annotations

import json
import os
import threading
import time
from logging import ERROR, INFO, WARNING

from cni.agent.log import log
from cni.config import policy, schema
from cni.config.mac import PLAIN
from cni.config.netconf import canonical
from cni.config.policy import Interface, Policy
from cni.dataclass import dataclass
from cni.errors import CniError, reason
from cni.spec import INVALID_NETWORK_CONFIG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

VARIABLE = "DP_MACVTAP_CONF"
_AGAIN_SECONDS = 1.0
"""How soon a refused file is read again although it looks the same: its folder, or its disk, may be repaired."""


class Policies:
    """Returns the current policy when called. Each call costs one stat(2) of the file, so no answer is stale.

    conf: the value of DP_MACVTAP_CONF, if it is set. required: whether the file must exist unless conf is set; else
    none means no restriction, as long as there has not been one. Raises CniError 7 if conf is invalid.
    """

    def __init__(self, path: str, conf: str | None = None, *, required: bool = False) -> None:
        self.path = path
        self.error: CniError | None = None
        """Why the file as it is now is not in force; None if it is, or if there need not be one."""
        self._must_exist = required and conf is None
        listed = None if conf is None else interfaces(conf)
        self._named = listed.interfaces if listed else ()
        self._restricts = listed is not None and not listed.everything
        self.discovers = listed is not None and listed.everything
        """Whether DP_MACVTAP_CONF is an empty list, which means: every suitable link."""
        self._found: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._seen: object = ()
        self._again = 0.0  # when a refused file is read again; monotonic seconds
        self._file: Policy | None = None
        self._good: Policy | None = None
        self._ever_valid = False
        for why in listed.left_out if listed else ():
            log(ERROR, f"an entry of {VARIABLE} is left out", error=why)

    def __call__(self) -> Policy | None:
        """The policy in force; None if there is none. Raises CniError 7 if no version of the file has been valid."""
        seen = self._identity()
        if self._due(seen):
            with self._lock:
                if self._due(seen):
                    self._read()
                    self._seen, self._again = seen, time.monotonic() + _AGAIN_SECONDS
        if self.error and not self._ever_valid:
            raise self.error
        return self._good

    def discovered(self, links: Iterable[str]) -> None:
        """Set the discovered links: each is an interface of its own name, unless the file has that name or source."""
        with self._lock:
            self._found = tuple(links)
            self._good = self._merged()

    def _due(self, seen: object) -> bool:
        return seen != self._seen or (self.error is not None and time.monotonic() >= self._again)

    def _read(self) -> None:
        try:
            file = policy.load(self.path)
            if file is None and self._must_exist:
                raise CniError(
                    INVALID_NETWORK_CONFIG,
                    f"the policy file {self.path} does not exist: put it there; an empty one allows nothing",
                )
        except CniError as error:
            self._must_exist = True  # there is, or was, one
            if str(error) != str(self.error):
                log(
                    ERROR,
                    "the policy file is refused; the last good one stays",
                    path=self.path,
                    error=str(error),
                )
            self.error = error
        else:
            self.error, self._file = None, file
            self._must_exist |= file is not None
            self._ever_valid |= file is not None
            names = [entry.name for entry in self._file.interfaces] if self._file else None
            log(INFO, "policy read", path=self.path, interfaces=names)
            if both := {entry.name for entry in self._named} & set(names or ()):
                log(WARNING, f"the policy file overrides {VARIABLE}", interfaces=sorted(both))
            self._good = self._merged()

    def _merged(self) -> Policy | None:
        if not self._restricts and not self._found:
            return self._file
        listed = self._file.interfaces if self._file else ()
        names, sources = {entry.name for entry in listed}, {dev for entry in listed for dev in entry.sources}
        # A link that the file restricts must not be available without restrictions under its own name.
        free = [link for link in self._found if link not in names | sources]
        return Policy(
            (
                *listed,
                *(entry for entry in self._named if entry.name not in names),
                *(Interface(link, link, "ethernet", None, None) for link in free),
            ),
            allow_unlisted=self._file.allow_unlisted if self._file else not self._restricts,
            derivation=self._file.derivation if self._file else PLAIN,
            macs=self._file.macs if self._file else None,
            ipam_types=self._file.ipam_types if self._file else None,
        )

    def _identity(self) -> object:
        try:
            status = os.stat(self.path)
        except OSError as error:
            return error.errno, os.path.lexists(
                self.path
            )  # a symlink that leads nowhere is not an absent file
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


@dataclass(frozen=True)
class Listed:
    """What DP_MACVTAP_CONF lists."""

    interfaces: tuple[Interface, ...]
    left_out: tuple[str, ...]
    """Why an entry is left out, for each that is."""

    @property
    def everything(self) -> bool:
        """Whether it lists nothing, which means: every suitable link. Entries that are left out are something."""
        return not self.interfaces and not self.left_out


def interfaces(conf: str) -> Listed:
    """The interfaces in the value of DP_MACVTAP_CONF, as kubevirt/macvtap-cni reads it (pkg/deviceplugin/lister.go).

    Keys may have any case, unknown keys are ignored, and of entries with one name the last counts. null is an empty
    list, and in a field, as "" or a capacity below 1, the default. An entry that is invalid all the same is left out,
    where macvtap-cni would not start, or fail in each Allocate. Raises CniError 7 if it is no JSON list.
    """
    rules = schema.load("macvtap-cni")
    try:
        document = json.loads(conf)
    except (ValueError, RecursionError) as error:
        raise CniError(INVALID_NETWORK_CONFIG, f"{VARIABLE}: {reason(error)}") from error
    if not isinstance(document, list | None):
        raise CniError(
            INVALID_NETWORK_CONFIG, f"{VARIABLE}: {schema.show(document)} is not allowed; give a list"
        )
    found: dict[str, Interface] = {}
    left_out = []
    for number, each in enumerate(document or ()):
        try:
            entry = _entry(rules["items"], each)
        except CniError as error:
            left_out.append(
                f"[{number}].{error.msg}" if isinstance(each, dict) else f"[{number}]: {error.msg}"
            )
            continue
        found[entry.name] = entry
    return Listed(tuple(found.values()), tuple(left_out))


def _entry(rules: dict[str, Any], document: Any) -> Interface:
    known = {key.lower(): key for key in rules["properties"]}
    foreign = {}
    if isinstance(document, dict):
        lower = {key.lower(): value for key, value in document.items()}
        document = {known[key]: value for key, value in lower.items() if key in known}
        if type(capacity := document.get("capacity")) is int and capacity < 1:
            del document["capacity"]
        document = schema.given(rules, document, zero=True)
        foreign = lower
    if "master" in foreign and "lowerDevice" not in document:
        device = schema.show(foreign["master"])
        raise CniError(INVALID_NETWORK_CONFIG, f"master: is called lowerDevice; give lowerDevice: {device}")
    if not schema.accepts(rules, document):
        schema.explain(rules, document)
    entry = schema.defaults(rules) | document
    modes = (canonical(entry["mode"]),)
    return Interface(entry["name"], entry["lowerDevice"], "ethernet", modes, int(entry["capacity"]))
