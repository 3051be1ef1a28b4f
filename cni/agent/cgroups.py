"""Finds the control groups of pods, to learn when a pod has ended. Must not change any.

A kubelet makes a pod's group before the sandbox and removes it when no process is left in it, which the kernel
enforces. Its name has the pod's UID: "podUID", or "…-podUID.slice" with "_" for "-" (k8s.io/kubernetes,
pkg/kubelet/cm/cgroup_manager_linux.go, pod_container_manager_linux.go). The folders above it depend on the node: they
are learned from any pod's group.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

_POD = re.compile(r"(.*\bpod)([0-9a-f]{32}|[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(\.slice)?")
_UID = re.compile(r"[0-9A-Za-z-]{1,64}")
_WALK_SECONDS = 2.0
"""The least time from one walk through all groups to the next."""
_MOST = 20_000
"""Folders of one walk at most."""


class Cgroups:
    """The control groups below folder, where the host's are mounted. Threads may share it."""

    def __init__(self, folder: str) -> None:
        # Of version 1: a kubelet makes a pod's group in this hierarchy before the sandbox; not in "devices".
        memory = f"{folder}/memory"
        self._folder = memory if os.path.isdir(memory) else folder
        self._layouts: set[tuple[str, str, str]] = set()
        """What is before and after the UID in the path of a pod's group, and what stands for its dashes."""
        self._due = 0.0

    def find(self, pod: str) -> str:
        """The folder of the group of the pod with that UID; "" if none is found."""
        if not _UID.fullmatch(pod):
            return ""
        found = self._probe(pod)
        if not found and time.monotonic() >= self._due:
            self._due = time.monotonic() + _WALK_SECONDS
            self._learn()
            found = self._probe(pod)
        return found

    @property
    def seen(self) -> bool:
        """Whether find() has seen the group of any pod: if not, a pod that it does not find may still be there."""
        return bool(self._layouts)

    def find_sandbox(self, container: str) -> str:
        """The folder of the group of the pod that has a container of that id; "" if none is found."""
        for parent in {os.path.dirname(before) for before, _, _ in list(self._layouts)}:
            for path in _folders(parent):
                names = [os.path.basename(each) for each in _folders(path) if _POD.fullmatch(path)]
                if any(name == container or name.endswith(f"-{container}.scope") for name in names):
                    return path
        return ""

    def _probe(self, pod: str) -> str:
        paths = (f"{before}{pod.replace('-', dash)}{after}" for before, after, dash in list(self._layouts))
        return next(filter(os.path.isdir, paths), "")

    def _learn(self) -> None:
        """Learn the layouts of all groups that look like a pod's; what is below such a group is the pod's own."""
        folders = [self._folder]
        for _ in range(_MOST):
            if not folders:
                return
            for path in _folders(folders.pop()):
                if match := _POD.fullmatch(path):
                    dash = "_" if match[3] else "-"
                    self._layouts.add((match[1], match[3] or "", dash))
                else:
                    folders.append(path)


def ended(cgroup: str) -> bool:
    """Whether a group that was seen in that folder has been removed. False if the folder above it is not there."""
    return os.path.isdir(os.path.dirname(cgroup)) and not os.path.lexists(cgroup)


def _folders(path: str) -> list[str]:
    with suppress(OSError), os.scandir(path) as entries:
        return [each.path for each in entries if each.is_dir(follow_symlinks=False)]
    return []
