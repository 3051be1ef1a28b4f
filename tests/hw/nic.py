"""An emulated NIC from the tests' side: its PF, its VFs, and the other end of its wire."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import hw
from lab.wire import Netns, run

_BY_MAC = {mac: name for name, mac in (hw.NICS | hw.WIRES).items()}


class Root(Netns):
    """The machine's first namespace: where a driver's links appear, and so the node of these tests."""

    def __init__(self) -> None:
        self.path = Path("/proc/1/ns/net")

    def close(self) -> None:
        """It stays."""


@dataclass(frozen=True)
class Nic:
    """A PF and its wire's other end, both of the machine's first namespace."""

    pf: str
    wire: str

    @property
    def device(self) -> Path:
        """The PF's PCI device."""
        return Path("/sys/class/net", self.pf, "device")

    def make_vfs(self, count: int) -> None:
        """0 takes them all away; the kernel takes no other number while there are some."""
        (self.device / "sriov_numvfs").write_text(str(count))

    def pci(self, vf: int) -> str:
        """The VF's PCI address."""
        return os.readlink(self.device / f"virtfn{vf}").rpartition("/")[2]

    def netdev(self, vf: int) -> str:
        """The name of the VF's link; of one in the first namespace only."""
        (name,) = os.listdir(self.device / f"virtfn{vf}/net")
        return name

    def settings(self) -> list[dict[str, Any]]:
        """What the PF says of its VFs, in their order."""
        (link,) = json.loads(run(["ip", "-j", "-d", "link", "show", "dev", self.pf]).stdout)
        settings: list[dict[str, Any]] = link["vfinfo_list"]
        return settings


def name_all() -> None:
    """Gives the NICs their names: the kernel's depend on which was found first."""
    for link in json.loads(run(["ip", "-j", "link", "show"]).stdout):
        if name := _BY_MAC.get(link.get("address")):
            run(["ip", "link", "set", link["ifname"], "name", name, "up"])
