"""Z: everything that an attachment may leave is back where it was before.

Links of node and pods, the state folder's files, the delegate's leases, the lower device's promiscuity, device
nodes of the attachments' ifindexes in the kernel's /dev, and processes of ours (and with them fds and locks).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.waiting import until_as_before

if TYPE_CHECKING:
    from lab.wire import Netns
    from tests.runner import Plugin

DELEGATE = """#!/bin/sh
# Leases one address to each attachment, as a file; does what the file `behave` says.
cat > /dev/null
cd "{folder}" || exit 1
echo "$CNI_COMMAND" >> log
lease="leases/$CNI_CONTAINERID-$CNI_IFNAME"
behave=$(cat behave 2> /dev/null)
case "$CNI_COMMAND" in
ADD)
    [ "$behave" != late ] || read -r line < gate
    touch "$lease"
    case "$behave" in
    hang) touch hanging; exec sleep 3600 ;;
    gate) read -r line < gate ;;
    fail) echo '{{"cniVersion":"1.1.0","code":11,"msg":"no address left"}}'; exit 1 ;;
    mute) exit 3 ;;
    junk) echo 'leased!'; exit 0 ;;
    list) echo '[]'; exit 0 ;;
    noip) echo '{{"ips":[{{"address":"10.6.0.500/24"}}]}}'; exit 0 ;;
    linger) sleep 3600 & touch hanging; exit 0 ;;
    esac
    echo '{{"cniVersion":"1.1.0","ips":[{{"address":"10.6.0.5/24","gateway":"10.6.0.1"}}]}}' ;;
DEL)
    rm -f "$lease"
    if [ "$behave" = faildel ]; then echo '{{"code":100,"msg":"the leases are locked"}}'; exit 1; fi ;;
esac
exit 0
"""


class Leaser:
    """An IPAM plugin that leaves files, to be found in CNI_PATH as `leaser`, and misbehaves when told to."""

    ipam = {"type": "leaser"}  # noqa: RUF012 - read only

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "leases").mkdir(parents=True)
        program = folder / "leaser"
        program.write_text(DELEGATE.format(folder=folder))
        program.chmod(0o755)

    def behave(self, how: str) -> None:
        (self.folder / "behave").write_text(how)

    def leases(self) -> set[str]:
        return set(os.listdir(self.folder / "leases"))

    def log(self) -> list[str]:
        """The commands that it was run with."""
        return (self.folder / "log").read_text().split() if (self.folder / "log").exists() else []


@dataclass
class Baseline:
    """What was there before; holds() says that it is all that is there now."""

    plugin: Plugin
    leaser: Leaser
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
            "pods": {str(pod.path): links(pod) for pod in self.pods if pod.path.exists()},
            "state": sorted(
                str(path) for path in state.rglob("*") if not path.is_dir() and path.name != "lock"
            ),
            "leases": self.leaser.leases(),
            "processes": processes(state),
        }


def links(pod: Netns) -> dict[str, dict[str, Any]]:
    """What of the links must not change; the rest is counters and timers."""
    keys = ("ifindex", "address", "mtu", "master", "promiscuity", "allmulti", "ifalias", "flags")
    return {name: {key: link.get(key) for key in keys} for name, link in pod.links().items()}


def processes(state: Path) -> list[int]:
    """Processes that were started for this state folder: the plugin's, and its delegates', which inherit it."""
    found = []
    mark = f"VMTAP_STATE={state}\0".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
