"""The virtual functions of a PF and their links, as sysfs shows them. Only reads.

Sources: Documentation/PCI/pci-iov-howto.rst, Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

from cni.dataclass import dataclass
from cni.kernel.sysfs import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni.kernel.rtnl import Link, Rtnl

SYSFS = "/sys"
_DEVICES = f"{SYSFS}/bus/pci/devices"
_TRIES, _PAUSE = 100, 0.05
"""How often, and after how many seconds, a link is looked for again that udev has just renamed."""
_NUMBER = re.compile(r"virtfn([0-9]+)")


@dataclass(frozen=True)
class Function:
    """One VF. link: its network device's name; None while a driver has none in this network namespace."""

    pf: str
    number: int
    pci: str
    """The PCI address, "0000:01:10.0"."""
    driver: str | None
    link: str | None
    numa: int
    """The NUMA node; -1: the machine does not report one."""


def functions(pf: str, sysfs: str = SYSFS) -> list[Function]:
    """The VFs of a PF by number. sysfs: one that shows the PF's namespace, or else the calling thread's."""
    folder = f"{sysfs}/class/net/{pf}/device"
    found = []
    with suppress(FileNotFoundError):
        numbers = sorted(int(match[1]) for match in map(_NUMBER.fullmatch, os.listdir(folder)) if match)
        for number in numbers:
            vf = f"{folder}/virtfn{number}"
            pci = os.path.basename(os.readlink(vf))
            numa = int(read(f"{vf}/numa_node") or -1)
            found.append(Function(pf, number, pci, driver(vf), netdev(vf), numa))
    return found


def places(pool: Iterable[str], vfs: int | None, sysfs: str = SYSFS) -> list[tuple[str, Function | None]]:
    """The PF and VF of each device number that a kubelet knows.

    None stands for a VF that is not there: its PF is away, or ADD will make the PF's vfs first. So a VF keeps its
    number when another PF's VFs are made or removed.
    """
    found: list[tuple[str, Function | None]] = []
    for pf in pool:
        found += [(pf, each) for each in functions(pf, sysfs)] or [(pf, None)] * (vfs or 0)
    return found


def most(pf: str, sysfs: str = SYSFS) -> int:
    """How many VFs the PF could have; 0 if it is no PF."""
    return int(read(f"{sysfs}/class/net/{pf}/device/sriov_totalvfs") or 0)


def pf_link(host: Rtnl, pci: str) -> Link | None:
    """The link of the PF of the VF with that PCI address; None if there is none."""
    with suppress(OSError):
        for name in os.listdir(f"{_DEVICES}/{pci}/physfn/net"):
            return host.link(name=name)
    return None


def vf_link(host: Rtnl, pci: str) -> Link | None:
    """The link of the VF with that PCI address; None if it has none in this network namespace. Raises OSError."""
    for _ in range(_TRIES):
        name = netdev(f"{_DEVICES}/{pci}")
        if name is None:
            return None
        if link := host.link(name=name):
            return link
        time.sleep(_PAUSE)
    return None


def netdev(device: str) -> str | None:
    """The name of the PCI device's network device. device: its folder in sysfs."""
    with suppress(OSError):
        return next(iter(os.listdir(f"{device}/net")), None)
    return None


def driver(device: str) -> str | None:
    """The name of the PCI device's driver. device: its folder in sysfs."""
    with suppress(OSError):
        return os.path.basename(os.readlink(f"{device}/driver"))
    return None
