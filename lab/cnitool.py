"""cnitool, CNI's reference client, on a lab's node, without a trace of it on the machine.

libcni keeps its cache, and host-local its leases, in /var/lib/cni: each call has a mount namespace of its own in
which a folder of ours lies there. Must not know what the plugin does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.assets.programs import CLIENTS
from lab.process import Closing, run

if TYPE_CHECKING:
    import subprocess

    from lab.wire import Netns

# Where there is no /var/lib/cni none is made: what is above it gives way for the time of the call.
_SCRIPT = """
if [ -d /var/lib/cni ]; then mount --bind "$1/cni" /var/lib/cni; else mount --bind "$1" /var/lib; fi
shift
exec "$@"
"""


class Cnitool(Closing):
    """Calls cnitool on the node; a context manager.

    netconf: the folder with the network configs; policy: the node's policy file.
    """

    def __init__(self, node: Netns, *, netconf: Path, policy: Path) -> None:
        clients = CLIENTS.get()
        self._node = node
        self._program = clients / "cnitool"
        self._folder = tempfile.TemporaryDirectory(prefix=f"vmtap-cnitool-{os.getpid()}-", dir="/run")
        self._files = Path(self._folder.name)
        (self._files / "cni").mkdir()
        self.env = {
            "PATH": os.environ["PATH"],
            "NETCONFPATH": str(netconf),
            "CNI_PATH": f"{Path(sys.executable).parent}:{clients}",
            "VMTAP_POLICY": str(policy),
            "VMTAP_STATE": str(self._files / "state"),
        }
        """Of every call; the launcher needs VMTAP_STATE too."""

    def __call__(
        self, command: str, network: str, netns: Path, ifname: str = "net1", *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Any command: check, del, gc, status; LabError if check and it failed."""
        inside = self._node.argv([self._program, command, network, netns])
        return run(
            ["unshare", "--mount", "sh", "-euc", _SCRIPT, "sh", self._files, *inside],
            check=check,
            env={**self.env, "CNI_IFNAME": ifname},
        )

    def add(self, network: str, netns: Path, ifname: str = "net1") -> dict[str, Any]:
        """The result of an ADD."""
        result: dict[str, Any] = json.loads(self("add", network, netns, ifname).stdout)
        return result

    def left(self) -> list[str]:
        """What is remembered of attachments: state, leases, cached results; [] at the baseline.

        Not counted: locks, which outlive what they guard, and host-local's note of the last address it gave.
        """
        files = (path.relative_to(self._files) for path in self._files.rglob("*") if not path.is_dir())
        return sorted(
            str(path) for path in files if "lock" not in path.name and "last_reserved" not in path.name
        )

    def close(self) -> None:
        self._folder.cleanup()
