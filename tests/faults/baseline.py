"""A baseline: everything that an attachment may leave, which must be as before when it has ended.

Links of node and pods, their tables of nf_tables, the state folder's files, the delegate's leases, the lower device's
promiscuity, device nodes of the attachments' ifindexes in the kernel's /dev, and processes of ours (and with them fds
and locks).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.waiting import until_as_before

if TYPE_CHECKING:
    from lab.wire import Netns
    from tests.fakeipam import FakeIpam
    from tests.runner import Plugin


@dataclass
class Baseline:
    """What was there before; holds() says that it is all that is there now."""

    plugin: Plugin
    ipam: FakeIpam
    pods: list[Netns]
    before: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._now()

    def holds(self) -> None:
        """Fails the test with what differs, late ends included: of a process after its pipe, of a link."""
        until_as_before(self._now, self.before)

    def _now(self) -> dict[str, Any]:
        state = self.plugin.state
        return {
            "node": links(self.plugin.node),
            "filters": [
                each.run(["nft", "list", "tables"]).stdout
                for each in (self.plugin.node, *self.pods)
                if each.path.exists()
            ],
            "pods": {str(pod.path): links(pod) for pod in self.pods if pod.path.exists()},
            "state": sorted(
                str(path) for path in state.rglob("*") if not path.is_dir() and path.name != "lock"
            ),
            "leases": self.ipam.leases(),
            "processes": processes(state),
        }


def links(pod: Netns) -> dict[str, dict[str, Any]]:
    """What of the links must not change; the rest is counters and timers."""
    keys = ("ifindex", "address", "mtu", "master", "promiscuity", "allmulti", "ifalias", "flags")
    return {name: {key: link.get(key) for key in keys} for name, link in pod.links().items()}


def processes(state: Path) -> list[int]:
    """Processes that were started for this state folder: the plugin's, and its delegates', which inherit it."""
    found = []
    mark = f"VMTAP_RUN={state}\0".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
