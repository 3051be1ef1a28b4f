"""The node's folders, files and addresses: from flags, else the plugin's variables, else the agent's file."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cni.agent import settings
from cni.config import schema
from cni.errors import CniError
from cni.state import folder


@dataclass(frozen=True)
class Settings:
    """fault: why the agent's file is refused; the defaults are used then."""

    run: str
    policy: str
    metrics: str
    health: str
    device_plugin: bool
    kubelet: str
    cdi: str
    dra: bool
    cgroup: str
    broker: bool
    """Whether containers get the broker's socket; without it, the agent opens no device."""
    fault: CniError | None = None


def load(*, run: str | None, policy: str | None, file: str | None) -> Settings:
    """The locations. A bad agent's file is no error: the commands must work then, too."""
    fault = None
    try:
        agent = vars(settings.load(["--config", file] if file else []))
    except CniError as error:
        agent, fault = schema.defaults(schema.load("agent")), error
    return Settings(
        run=run or folder.named(os.environ) or agent["run"],
        policy=policy or os.environ.get("VMTAP_POLICY") or agent["policy"],
        metrics=os.environ.get("VMTAP_METRICS", agent["metrics"]),
        health=agent["health"],
        device_plugin=bool(agent.get("device_plugin")),  # not there: it stands in, and is off
        kubelet=agent["kubelet"],
        cdi=agent["cdi"],
        dra=bool(agent["dra"]),
        cgroup=agent["cgroup"],
        broker=bool(agent.get("broker_mount", True)),
        fault=fault,
    )
