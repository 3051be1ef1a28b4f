"""Removes the entries of minors (state/minors.py) whose containers have ended, and adds those that are missing."""

from __future__ import annotations

import os
from contextlib import suppress
from logging import INFO

from cni.agent import cgroups
from cni.agent.log import log
from cni.config import netconf
from cni.dataclass import replace
from cni.state import minors
from cni.state.minors import Given
from cni.state.record import boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni.agent.cgroups import Cgroups
    from cni.agent.metrics import Registry
    from cni.attach.call import Node


class Minors:
    """The entries. busy: whether there are any, as of the last look()."""

    def __init__(self, node: Node, groups: Cgroups, registry: Registry) -> None:
        self._store = node.store
        self._groups = groups
        self._unrecorded: frozenset[str] = frozenset()
        self.busy = False
        registry.computed(
            "vmtap_minors_kept",
            "Minors of macvtaps that are kept for a pod that is detached and may still run.",
            look=lambda: {(): self._kept()},
        )

    def look(self) -> None:
        """Find the control groups that nobody has seen yet, and remove the entries of pods that have ended.

        Does not touch what complete() was told to leave alone, nor what a request is at.
        """
        given = self._store.minors.all()
        self.busy = bool(given)
        recorded = set(self._store.recorded()) if given else set()
        for minor, each in given.items():
            if each.boot_id != boot_id():
                self._store.minors.remove(minor)
            elif each.attachment in self._unrecorded:
                continue
            with suppress(BlockingIOError):
                if each.pod and not each.cgroup:
                    self._find(minor, each)
                elif each.attachment not in recorded and (not each.pod or cgroups.ended(each.cgroup)):
                    self._remove(minor, each)

    def complete(self, unrecorded: Iterable[str]) -> None:
        """Add entries for the records that have a node and no entry: another version's agent has made them.

        unrecorded: the attachments that have a link and no record, and are being adopted. Until the next call their
        entries stay, and their locks are free for the adoption, which does not wait for them.
        """
        self._unrecorded = frozenset(unrecorded)
        given = {each.attachment for each in self._store.minors.all().values()}
        for record in self._store.records():
            if record.node and record.id not in given:
                with (
                    suppress(FileNotFoundError, BlockingIOError),
                    self._store.locked(record.id, wait=False),
                ):
                    minor = os.minor(os.stat(record.node).st_rdev)
                    arguments = netconf.arguments(record.args, command="DEL")
                    pod = minors.pod(arguments, record)
                    if self._store.minors.get(minor) is None:
                        self._store.minors.give(minor, Given(record.id, record.boot_id, pod))

    def _find(self, minor: int, given: Given) -> None:
        cgroup = self._groups.find(given.pod) or self._groups.find_sandbox(given.pod)
        if cgroup:
            with self._store.locked(given.attachment, wait=False):
                if self._store.minors.get(minor) == given:
                    self._store.minors.give(minor, replace(given, cgroup=cgroup))

    def _remove(self, minor: int, given: Given) -> None:
        with self._store.locked(given.attachment, wait=False):
            if self._store.load(given.attachment) is None and self._store.minors.get(minor) == given:
                self._store.minors.remove(minor)
        log(INFO, "a minor is free again", minor=minor, pod=given.pod, attachment=given.attachment)

    def _kept(self) -> int:
        recorded = set(self._store.recorded())
        return sum(each.attachment not in recorded for each in self._store.minors.all().values())
