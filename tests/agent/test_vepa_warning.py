"""The agent says once, for each source, what vepa needs of the switch, unless somebody has seen it reflect."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from tests.agent.conftest import Agent
from tests.runner import BIN, config
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from lab.wire import Lab

MSG = "guests of this node will not reach each other unless the switch reflects"


def _attach(agent: Agent, lab: Lab, *modes: str) -> list[dict[str, object]]:
    """Attachments in these modes, in a pod of their own; what the agent said of it, which it is ended for."""
    pod = lab.pod()
    for number, mode in enumerate(modes):
        conf = config(source="eth1", mode=mode)
        agent.shim()("ADD", conf, netns=pod, container=pod.path.name, ifname=f"net{number}").ok()
    agent.end()
    said = [line for line in agent.log if line["msg"] == MSG]
    agent.log.clear()
    return said


def _probe(agent: Agent, lab: Lab) -> int:
    argv = lab.node.argv([BIN / "vmtapctl", "probe", "eth1", "--run", agent.run])
    return subprocess.run(argv, stdout=subprocess.DEVNULL, timeout=LIMIT, check=False).returncode


def test_vepa_on_a_source_that_was_not_seen_to_reflect(agent: Agent, lab: Lab) -> None:
    assert _attach(agent, lab, "bridge", "pepa") == []
    [said] = _attach(agent.start(), lab, "vepa", "vepa", "vepa")
    assert (said["level"], said["source"], said["probed"]) == ("warning", "eth1", "never")
    assert said["next"] == "vmtapctl probe eth1"
    assert _probe(agent, lab) == 1
    [said] = _attach(agent.start(), lab, "vepa", "vepa")
    assert "no frame between two vepa macvtaps came back" in str(said["probed"])
    lab.switch.reflect(True)
    assert _probe(agent, lab) == 0
    assert _attach(agent.start(), lab, "vepa") == []
