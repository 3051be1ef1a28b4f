"""SIGKILL before and after each step of an ADD: DEL, GC or the reconciler alone ends what was begun; then ADD works.

Every system call of the ADD that changes something outside the process is found in a traced run, and then made to
kill the process as it is entered, one run for each. A kill between two of them is the same as one at the second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from cni.agent.cgroups import Cgroups
from cni.agent.metrics import Registry
from cni.agent.reconcile.runner import Reconciler
from cni.attach.call import Node
from cni.errors import CniError
from cni.state.store import Store
from lab.wire import BRIDGE, NIC
from tests.fakeipam import FakeIpam
from tests.faults.baseline import processes
from tests.faults.inject import CHANGES, points
from tests.runner import config
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.attach.call import Request
    from cni.plugin import Response
    from lab.wire import Netns
    from tests.faults.baseline import Baseline
    from tests.faults.inject import Injector
    from tests.runner import Answer, Plugin

IPAM = FakeIpam.config
PORT = {"macSpoofCheck": True, "ipSpoofCheck": True, "rate": {"in": "1Gbit", "out": "1Gbit"}}
CASES: dict[str, dict[str, Any]] = {
    "macvtap": {"source": NIC, "owner": 107, "ipam": IPAM, "port": PORT},
    "tap on a bridge": {
        "source": BRIDGE,
        "device": "tap",
        "mode": "pepa",
        "ipam": IPAM,
        "queues": 2,
        "port": PORT,
    },
}


def _reconcile(plugin: Plugin, delegate_seconds: float = 60) -> None:
    """Runs of the agent's reconciler on the node, until no record is of an ADD that was killed.

    One is enough as a rule. A step that fails, or whose attachment is locked, is tried again in the next run.
    """
    store = Store(plugin.state)

    def unasked(_: Request) -> Response:
        raise AssertionError("nothing was pending")

    def run() -> None:
        node = Node(store, lambda: None, delegate_seconds)
        reconciler = Reconciler(node, unasked, Cgroups("/sys/fs/cgroup"), Registry(), seconds=2)
        reconciler.start()
        try:
            until(ended, "an ADD that was killed was not ended")
        finally:
            reconciler.stop(LIMIT)

    def ended() -> bool:
        try:
            return all(map(store.sealed, store.recorded()))
        except CniError:  # a record was removed meanwhile
            return False

    plugin.node.call(run)


@pytest.mark.parametrize("clean_up", ["DEL", "GC", "reconciler"])
@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_each_step_of_add(
    *,
    injector: Injector,
    handle: Callable[..., Answer],
    plugin: Plugin,
    pod: Netns,
    baseline: Baseline,
    case: str,
    clean_up: str,
) -> None:
    conf = config(**CASES[case])
    nobody = conf | {"cni.dev/valid-attachments": []}
    handle("ADD", conf, netns=pod).ok()  # makes the folders of state
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()

    answer, trace = injector("ADD", conf, "-e", f"trace={CHANGES}", netns=pod)
    answer.ok()
    handle("DEL", conf, netns=pod).ok()
    steps = points(trace)
    assert {"openat", "symlink", "rename", "sendto", "write", "vfork", "mknodat"} <= {p.call for p in steps}

    for step in steps:
        killed, seen = injector(
            "ADD",
            conf,
            *("-e", f"trace={step.call}"),
            *("-e", f"inject={step.call}:signal=SIGKILL:when={step.nth}"),
            netns=pod,
        )
        try:
            assert killed.status == -signal.SIGKILL, "it was not killed"
            if clean_up == "DEL":
                handle("DEL", conf, netns=pod).ok()
            elif clean_up == "GC":
                handle("GC", nobody).ok()
            else:
                _reconcile(plugin)
                if (
                    "write(1, " in seen
                ):  # a library's own wake-ups may have moved the count since the first run
                    # All was made, and only the runtime knows that it got no answer: its DEL follows.
                    assert list(Store(plugin.state).records())
                    handle("DEL", conf, netns=pod).ok()
            baseline.holds()
            result = handle("ADD", conf, netns=pod).ok()
            handle("CHECK", conf | {"prevResult": result}, netns=pod).ok()
            handle("DEL", conf, netns=pod).ok()
            baseline.holds()
        except AssertionError as error:
            error.add_note(f"killed at {step}")
            raise


def wait_for_orphans(plugin: Plugin) -> None:
    """Until no process of a delegate is left: where the test's own process runs the plugin, they outlive it."""
    until(
        lambda: processes(plugin.state), "a delegate of the killed plugin does not end", lambda left: not left
    )


def test_a_delegate_does_not_outlive_its_plugin(
    *, plugin: Plugin, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, ipam: FakeIpam
) -> None:
    gate = ipam.seen / "gate"
    os.mkfifo(gate)
    ipam.write(ADD="read -r line < gate; lease; answer")
    conf = config(source=NIC, ipam=IPAM)
    with subprocess.Popen(
        plugin.argv(), stdin=subprocess.PIPE, env=plugin.environment("ADD", pod)
    ) as process:
        assert process.stdin
        process.stdin.write(json.dumps(conf).encode())
        process.stdin.close()
        with gate.open("w"):  # the delegate is there, and waits
            process.kill()
            process.wait()
            handle("DEL", conf, netns=pod).ok()
    wait_for_orphans(plugin)
    baseline.holds()


def test_an_add_after_a_kill_gives_the_lease_back_first(
    *,
    injector: Injector,
    handle: Callable[..., Answer],
    pod: Netns,
    baseline: Baseline,
    ipam: FakeIpam,
) -> None:
    """Without any DEL between: the lease of the killed one is not kept twice."""
    conf = config(source=NIC, ipam=IPAM)
    killed, _ = injector("ADD", conf, "-e", "inject=rename:signal=SIGKILL:when=2", netns=pod)
    assert killed.status == -signal.SIGKILL
    assert ipam.leases() == {"c1-net1"}
    handle("ADD", conf, netns=pod).ok()
    assert ipam.commands() == ["ADD", "DEL", "ADD"]
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()
