"""A node as a container runtime finds it: network configs, a folder of CNI plugins, and our agent."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab.runtimes.containerd import Containerd
from lab.runtimes.machine import Machine
from lab.runtimes.podman import Podman
from tests.agent.conftest import SHIM, Agent
from tests.runner import BIN
from tests.waiting import until, until_as_before

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab

RUN = Path("/run/vmtap")
"""On the node: the place where every part looks for it by itself."""
REFERENCE = Path("/usr/lib/cni")
"""Where the package containernetworking-plugins has them."""
BRIDGE = "cni0"
WIRE = {"type": "vmtap", "source": "eth1", "mode": "bridge"}
"""A network of ours in a config."""
_PODMANS_OWN = "/run/lab/podman/graph/overlay"
"""A mount that is there, or not, as the last podman left it."""


@dataclass
class Node:
    """The lab's node with all that a runtime needs; a pod's first network is a bridge with addresses."""

    lab: Lab
    machine: Machine
    folder: Path
    agent: Agent
    one_shot: bool = False
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.netconf = self.folder / "net.d"
        self.plugins = self.folder / "bin"
        self.netconf.mkdir()
        self.plugins.mkdir()
        for name in ("bridge", "host-local", "loopback"):
            (self.plugins / name).symlink_to(REFERENCE / name)
        (self.plugins / "vmtap").symlink_to(BIN / "vmtap" if self.one_shot else SHIM)
        self.lab.node.ip(f"link add {BRIDGE} up type bridge")  # the plugin would make it, and leave it
        self.env = {
            "PATH": os.environ["PATH"],
            "VMTAP_POLICY": str(self.agent.policy),
            "VMTAP_WAIT": "60",  # for an agent that starts on a busy machine
        }
        subnet = {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}]]}
        self.network("10-pods", {"type": "bridge", "bridge": BRIDGE, "ipam": subnet})

    def network(self, name: str, *plugins: dict[str, Any], version: str = "1.0.0") -> None:
        """A network config in the runtime's folder."""
        text = json.dumps({"cniVersion": version, "name": name, "plugins": plugins})
        (self.netconf / f"{name}.conflist").write_text(text)

    def containerd(self) -> Containerd:
        """Started now; a context manager."""
        return Containerd(self.machine, self.folder, netconf=self.netconf, plugins=self.plugins, env=self.env)

    def podman(self) -> Podman:
        """After its first container, which leaves a mount and a control group of podman's own for good."""
        podman = Podman(self.machine, self.folder, netconf=self.netconf, plugins=self.plugins, env=self.env)
        podman.run("first", ["10-pods"])
        podman.remove("first")
        until(lambda: not any("conmon" in each for each in self.machine.processes().values()), "conmon stays")
        return podman

    def policy(self, *entries: dict[str, Any]) -> None:
        """What network configs may attach to from now on."""
        self.agent.policy.write_text(json.dumps({"interfaces": entries}))  # JSON is YAML

    def records(self) -> list[dict[str, Any]]:
        """What the plugin holds attached."""
        found = []
        for path in self._in(RUN / "attachments", "*.json"):
            with suppress(FileNotFoundError):  # it ended just now
                found.append(json.loads(path.read_text()))
        return found

    def device(self, mac: str) -> Path:
        """The attachment's device node, as the node has it."""
        [index] = [record["ifindex"] for record in self.records() if record["mac"] == mac]
        return RUN / "dev" / f"tap{index}"

    def attached(self) -> list[Path]:
        """Everything that the plugin keeps of attachments."""
        folders = ("attachments", "ifindex", "dev", "holders", "pending")
        return [path for name in folders for path in self._in(RUN / name)]

    def traces(self) -> dict[str, Any]:
        """Everything that a pod may leave on the node, ours and the runtime's own."""
        files = [
            *self.attached(),
            *(path for path in self._in("/var/lib/cni", "**/*") if not path.is_dir() and not _stays(path)),
            *self._in("/run/netns"),
            *self._in("/run/cdi"),
        ]
        return {
            "files": sorted(str(path) for path in files),
            "links": sorted(self.lab.node.links()),
            "processes": sorted(self.machine.processes().values()),
            "mounts": [point for point in self.machine.mounts() if point != _PODMANS_OWN],
            "control groups": len(self.machine.cgroups()),
            "promiscuity": self.lab.node.links()["eth1"]["promiscuity"],
        }

    def left(self, before: dict[str, Any]) -> None:
        """Fails the test if anything of the traces is not as it was before, after giving it a moment."""
        until_as_before(self.traces, before)

    def _in(self, folder: str | Path, pattern: str = "*") -> list[Path]:
        return [*self.machine.path(folder).glob(pattern)]


def _stays(path: Path) -> bool:
    """host-local's lock and its note of the last address."""
    return "lock" in path.name or "last_reserved" in path.name


@pytest.fixture(params=["agent"])
def node(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Iterator[Node]:
    """With the agent and the shim; with the one-shot executable, where a test asks for "one-shot"."""
    with Machine(lab.node) as machine:
        agent = Agent(
            machine,
            RUN,
            tmp_path / "interfaces.yaml",
            flags=("--metrics", "127.0.0.1:0", "--health", "127.0.0.1:0"),
        )
        made = Node(lab, machine, tmp_path, agent, one_shot=request.param == "one-shot")
        if not made.one_shot:
            agent.start()
        yield made
        if agent.process:
            agent.end()
