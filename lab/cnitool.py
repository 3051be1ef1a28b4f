"""cnitool, CNI's reference client, on a lab's node. It leaves nothing on the machine.

libcni keeps its cache, and host-local its leases, in /var/lib/cni: each call runs in a mount namespace in which a
temporary folder is mounted there. Must not know what the plugin does.
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

# If /var/lib/cni does not exist it is not created: the mount then covers /var/lib during the call.
_SCRIPT = """
if [ -d /var/lib/cni ]; then mount --bind "$1/cni" /var/lib/cni; else mount --bind "$1" /var/lib; fi
shift
exec "$@"
"""


class Cnitool(Closing):
    """Runs cnitool on the node; a context manager.

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
            "VMTAP_RUN": str(self._files / "state"),
        }
        """The environment of every call. The launcher needs VMTAP_RUN, too."""

    def __call__(
        self, command: str, network: str, netns: Path, ifname: str = "net1", *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command: check, del, gc or status. Raises LabError if check is set and the command fails."""
        inside = self._node.argv([self._program, command, network, netns])
        return run(
            ["unshare", "--mount", "sh", "-euc", _SCRIPT, "sh", self._files, *inside],
            check=check,
            env={**self.env, "CNI_IFNAME": ifname},
        )

    def add(self, network: str, netns: Path, ifname: str = "net1") -> dict[str, Any]:
        """Runs an ADD and returns its result. Raises LabError if it fails."""
        result: dict[str, Any] = json.loads(self("add", network, netns, ifname).stdout)
        return result

    def left(self) -> list[str]:
        """The files that attachments have left: state, leases, cached results. [] if all were deleted.

        Lock files stay, and so does host-local's file with the last address it reserved; these are left out.
        """
        files = (path.relative_to(self._files) for path in self._files.rglob("*") if not path.is_dir())
        return sorted(
            str(path) for path in files if "lock" not in path.name and "last_reserved" not in path.name
        )

    def close(self) -> None:
        self._folder.cleanup()
