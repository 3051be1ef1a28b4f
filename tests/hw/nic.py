"""An emulated NIC from the tests' side: its PF, its VFs, and the other end of its wire."""

from __future__ import annotations

import importlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.hw import Root
from lab.process import run

if TYPE_CHECKING:
    from collections.abc import Callable


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

    def count(self) -> int:
        return int((self.device / "sriov_numvfs").read_text())

    def pci(self, vf: int) -> str:
        """The VF's PCI address."""
        return os.readlink(self.device / f"virtfn{vf}").rpartition("/")[2]

    def netdev(self, vf: int) -> str:
        """The name of the VF's link; of one in the first namespace only."""
        (name,) = os.listdir(self.device / f"virtfn{vf}/net")
        return name

    def rebind(self, vf: int) -> None:
        """Its driver begins anew, with the MAC that the PF says."""
        driver = (self.device / f"virtfn{vf}/driver").resolve()
        for file in ("unbind", "bind"):
            (driver / file).write_text(self.pci(vf))

    def state(self) -> list[str]:
        """All that an attachment could leave changed: each VF as the PF describes it, and its own link."""
        links = Root().links()
        found = []
        for number, setting in enumerate(self.settings()):
            name = self.netdev(number)
            keys = ("address", "mtu", "flags", "ifalias", "promiscuity", "allmulti")
            own: dict[str, Any] = {key: links[name].get(key) for key in keys}
            own["flags"] = sorted(own["flags"])
            own["disable_ipv6"] = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").read_text().strip()
            found += [f"vf {number} {key} {value}" for key, value in setting.items()]
            found += [f"{name} {key} {value}" for key, value in own.items()]
        return found

    def changed_since(self, state: list[str]) -> list[str]:
        """What is in one of the two states only."""
        return sorted({*state} ^ {*self.state()})

    def settings(self) -> list[dict[str, Any]]:
        """What the PF says of its VFs, in their order."""
        (link,) = json.loads(run(["ip", "-j", "-d", "link", "show", "dev", self.pf]).stdout)
        settings: list[dict[str, Any]] = link["vfinfo_list"]
        return settings


PF0, PF1 = Nic("pf0", "wire0"), Nic("pf1", "wire1")


def killed(work: Callable[[], object], where: str, calls: int) -> None:
    """Work done by a child that dies when that function has returned to it for that number of times."""
    if not (child := os.fork()):
        _die_after(where, calls)
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _die_after(where: str, calls: int) -> None:
    """Makes this process kill itself when that function has returned for that number of times."""
    module_name, _, name = where.rpartition(".")
    module = importlib.import_module(module_name)
    real, left = getattr(module, name), iter(range(calls))

    def wrapped(*args: Any, **named: Any) -> Any:
        answer = real(*args, **named)
        if next(left) == calls - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(module, name, wrapped)
