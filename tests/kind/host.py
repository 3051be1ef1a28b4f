"""What a kind cluster must leave as it was on this machine: links, rules, mounts, control groups, names, settings."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections import Counter
from pathlib import Path

from lab.process import run
from lab.runtimes.machine import CGROUPS
from lab.wire import FOLDER

_SETTINGS = (
    *("fs/file-max", "fs/nr_open", "fs/protected_hardlinks", "fs/protected_symlinks"),
    *(
        "kernel/core_pattern",
        "kernel/panic",
        "kernel/panic_on_oops",
        "kernel/pid_max",
        "kernel/printk",
        "kernel/sysrq",
    ),
    *("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes", "vm/overcommit_memory", "vm/panic_on_oom"),
    *("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"),
)
"""Of /proc/sys: those that dockerd, systemd or a kubelet sets."""
_PLACES = ("/run", "/etc", "/var/lib", "/lib", "/root", str(CGROUPS), f"{CGROUPS}/memory")


def look(pid: int) -> Counter[str]:
    """What is there now; of what labs and tests have made, only what is of the lab of process pid (0: of none)."""
    temporary = tempfile.gettempdir()
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    names = [str(path) for place in _PLACES if Path(place).is_dir() for path in Path(place).iterdir()]
    names += map(str, Path(temporary).glob("vmtap-kind-*"))
    settings = {name: Path("/proc/sys", name) for name in _SETTINGS}
    found = [
        *re.findall(r"^\d+: [^:@]+", run(["ip", "-o", "link"]).stdout, re.M),
        *run(["nft", "list", "ruleset"], check=False).stdout.splitlines(),
        *names,
        *(f"{name} = {path.read_text()}" for name, path in settings.items() if path.exists()),
        *(f"mounted: {name}" for name in mounts if not name.startswith(f"{temporary}/")),
    ]
    others = re.compile(rf"vmtap-(?!(lab|kind)-{pid}-)")
    return Counter(each for each in found if not others.search(each))


def added(before: Counter[str], pid: int) -> list[str]:
    """What look() sees now and has not seen before. What is gone was another's, who works beside the lab."""
    return sorted((look(pid) - before).elements())


def netns(pid: int) -> int:
    """The inode of the network namespace of the docker that the process pid has started."""
    [path] = FOLDER.glob(f"vmtap-lab-{pid}-*-docker")
    return path.stat().st_ino


def processes(inode: int) -> list[str]:
    """The command lines of the processes in a network namespace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (process / "ns/net").stat().st_ino == inode:
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found
