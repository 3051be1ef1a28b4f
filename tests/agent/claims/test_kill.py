"""SIGKILL of the agent at each step of an attach: the container fails, and with the next agent it gets its device."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.waiting import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab
    from tests.agent.claims.conftest import Node

CALLS = ("rename", "unlink", "sendto", "mknodat", "chmod", "setns", "fsmount", "sendmsg", "write")
"""System calls by which an attach changes something. A file that openat(2) makes is written to next."""


@contextmanager
def killed_at(node: Node, call: str, nth: int) -> Iterator[None]:
    """In the block, each thread of the agent gets SIGKILL as it enters its nth call of that name."""
    assert node.agent.process
    inject = f"inject={call}:signal=KILL:when={nth}"
    words = ["strace", "-f", "-o", "/dev/null", "-e", inject, "-p", str(node.agent.process.pid)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr
        said = strace.stderr.readline()
        assert "attached" in said, said
        yield
        # Some releases wait for ever for a thread of a killed process. A tracer that ends lets go of those that live.
        strace.kill()
        strace.communicate(timeout=LIMIT)


@pytest.mark.parametrize("call", CALLS)
def test_a_kill_at_each_step_of_an_attach(node: Node, lab: Lab, call: str) -> None:
    """Each thread counts for itself, so a few kills hit another thread of the agent; they count as well."""
    for nth in range(1, 30):
        pod, claim = lab.pod(), node.prepare(f"vm{nth}")
        with killed_at(node, call, nth):
            answer = node.hook(claim, pod, VMTAP_WAIT="0")
        assert node.agent.process
        if answer.status == 0:
            node.agent.end(signal.SIGKILL)
            node.agent.start()
            break
        assert node.agent.process.wait(LIMIT) == -signal.SIGKILL
        answer.refused("vmtapd does not answer")
        node.agent.end()
        assert node.reserved(claim)
        node.agent.start()
        answer = node.hook(claim, pod)
        if answer.status:  # it was created with the node of the attach that was killed
            answer.refused("create the container again")
            node.hook(claim, pod).ok()
        assert node.link(claim, pod) == node.device(claim) == node.given(claim)
        assert os.listdir(node.agent.run / "claims")
        node.claims.remove(claim.uid)
    else:
        raise AssertionError(f"an attach has more than {nth} calls of {call}")
