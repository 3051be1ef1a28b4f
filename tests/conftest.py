"""Fixtures that every kind of test may want: a wired lab, and the plugin on its node."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from lab.assets.programs import CLIENTS
from lab.wire import Lab
from tests.runner import Plugin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A shell's "&" leaves it ignored, to us and to all that we start; the tests of signals mean it to be heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test measures time: on a busy machine an example may take any, and so may making it up.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A host with a NIC, a switch and a peer, in namespaces of this test's own."""
    with Lab() as wired:
        yield wired


@pytest.fixture
def plugin(lab: Lab, tmp_path: Path) -> Plugin:
    """The installed vmtap on the lab's node, with no policy and no state yet."""
    return Plugin(node=lab.node, state=tmp_path / "state", policy=tmp_path / "interfaces.yaml")


@pytest.fixture(scope="session")
def reference_plugins() -> Path:
    """The folder with cnitool, host-local, tuning and bandwidth, as their project released them."""
    return CLIENTS.get()
