"""A virtual function and a VLAN beside a plain macvtap, in the machine with SR-IOV NICs (lab/hw.py).

Everything in it is emulated, so only ratios say something. Inside, this module answers the host's request.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import hw
from lab.assets.programs import BENCH
from lab.bench import node
from lab.bench.contenders import AGENT, AGENT_VF, AGENT_VLAN, Agent, Contender, Floor, Sample
from lab.bench.spawn import Spawner
from lab.wire import Netns

if TYPE_CHECKING:
    from lab.bench.node import Samples

_FAST, _PLAIN = hw.NICS
_VFS = 2
_POLICY = (
    {"name": "fast", "source": {"dev": _FAST}, "type": "sr-iov"},
    {"name": "plain", "source": {"dev": _PLAIN}, "type": "ethernet"},
)


def measure(rounds: int) -> Samples:
    """one_by_one() inside. Raises LabError, also if the machine's parts are not there."""
    with hw.Machine(f"-m {__name__}") as machine:
        (answer,) = machine.ask(rounds)
    return {
        name: {command: [Sample(*each) for each in taken] for command, taken in commands.items()}
        for name, commands in answer.items()
    }


def _inside(rounds: int) -> dict[str, Any]:
    root = hw.Root()
    hw.name_all()
    Path(f"/sys/class/net/{_FAST}/device/sriov_numvfs").write_text(str(_VFS))
    root.wait_until_up(*hw.NICS, *hw.WIRES)
    with contextlib.ExitStack() as stack:
        pod = stack.enter_context(Netns("pod"))
        agent = stack.enter_context(Agent(root, entries=_POLICY))
        floor = stack.enter_context(Floor(root, pod, _PLAIN))
        spawner = stack.enter_context(Spawner(BENCH.get() / "spawn", root))
        plain: dict[str, object] = {
            "type": "vmtap",
            "interface": "plain",
            "device": "macvtap",
            "mode": "bridge",
        }
        configs: dict[str, dict[str, object]] = {
            AGENT: plain,
            AGENT_VLAN: {**plain, "vlan": 100},
            AGENT_VF: {"type": "vmtap", "interface": "fast", "device": "macvtap"},
        }
        every = {
            name: Contender(name, BENCH.get() / "vmtap", config, {"VMTAP_RUN": str(agent.run)}, agent)
            for name, config in configs.items()
        }
        samples = node.one_by_one(spawner, every, floor, pod, rounds)
    return {
        name: {
            command: [(each.wall, each.cpu, each.peak) for each in taken]
            for command, taken in commands.items()
        }
        for name, commands in samples.items()
    }


def main() -> int:
    """Answers requests until the host hangs up."""
    for (rounds,), answer in hw.requests():
        answer(_inside(rounds))
        answer(None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
