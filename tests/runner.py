"""Runs the installed executable as a container runtime does: environment, config on stdin, answer on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cni.attach.call import Node
from cni.config.policy import load as load_policy
from cni.state.store import Store
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lab.wire import Netns

BIN = Path(sys.executable).parent
"""Where the console scripts were installed: beside the interpreter that runs the tests."""


@dataclass(frozen=True)
class Answer:
    """What one execution of the plugin left: exit status, stdout as it came, stderr."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        document: dict[str, Any] = json.loads(self.stdout)
        return document

    def ok(self) -> dict[str, Any]:
        """The document of a success ({} where there is none to be); fails the test otherwise."""
        assert self.status == 0, f"status {self.status}: {self.stdout.decode()} {self.stderr}"
        return self.document if self.stdout else {}

    def error(self, code: int) -> dict[str, Any]:
        """The error document, which must have that code; fails the test on success."""
        assert self.status != 0, f"it succeeded: {self.stdout.decode()}"
        document = self.document
        assert document["code"] == code, document
        assert "Traceback" not in self.stderr, self.stderr
        return document


@dataclass(frozen=True)
class Plugin:
    """The plugin on one node: which executable, in which network namespace, with which state and policy."""

    node: Netns
    state: Path
    policy: Path
    cni_path: str = ""
    executable: str = "vmtap"
    env: Mapping[str, str] = field(default_factory=dict)

    def __call__(
        self,
        command: str,
        config: Mapping[str, Any] | bytes,
        *,
        netns: Netns | str | Path | None = None,
        container: str = "c1",
        ifname: str = "net1",
        args: str = "",
        env: Mapping[str, str | None] | None = None,
    ) -> Answer:
        """Run one command. env overrides the CNI variables; None as a value leaves one out."""
        variables = self.environment(command, netns, container, ifname, args)
        for name, value in (env or {}).items():
            if value is None:
                variables.pop(name, None)
            else:
                variables[name] = value
        return self.execute(variables, config if isinstance(config, bytes) else json.dumps(config).encode())

    def execute(self, variables: dict[str, str], stdin: bytes) -> Answer:
        """One execution of it."""
        done = subprocess.run(
            self.argv(), input=stdin, env=variables, capture_output=True, timeout=LIMIT, check=False
        )
        return Answer(done.returncode, done.stdout, done.stderr.decode(errors="replace"))

    def given(self, **fields: Any) -> Node:
        """What the node gives to a request that plugin.handle carries out in this process. fields: Node's."""
        return Node(Store(self.state), partial(load_policy, self.policy), **fields)

    def argv(self) -> list[str]:
        """The command line: the executable inside the node's network namespace."""
        return [str(word) for word in self.node.argv([BIN / self.executable])]

    def environment(
        self,
        command: str,
        netns: Netns | str | Path | None,
        container: str = "c1",
        ifname: str = "net1",
        args: str = "",
    ) -> dict[str, str]:
        """Everything that the executable sees."""
        path = netns if isinstance(netns, str | Path) else netns.path if netns else ""
        return {
            "PATH": os.environ["PATH"],
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": str(path),
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
            "CNI_PATH": self.cni_path,
            "VMTAP_RUN": str(self.state),
            "VMTAP_POLICY": str(self.policy),
            **self.env,
        }

    def leftovers(self) -> list[str]:
        """Files of state that speak of an attachment: [] at the baseline."""
        folders = ("attachments", "ifindex", "vf", "dev", "holders")
        return sorted(str(path) for folder in folders for path in (self.state / folder).glob("*"))


def pod_args(name: str = "pod", namespace: str = "default", uid: str = "") -> str:
    """CNI_ARGS as a runtime sets them for that pod of Kubernetes; by default for the one of Kubelet.allocate()."""
    uid = uid or str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{namespace}"))
    return f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}"


def config(**fields: Any) -> dict[str, Any]:
    """A network config with the fields that each has."""
    return {"cniVersion": "1.1.0", "name": "wire", "type": "vmtap", **fields}
