"""Fixtures that every kind of test may want: a wired lab, and the plugin on its node."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

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


TOGETHER = ("tests/hw/", "tests/cluster/", "tests/deploy/test_monitoring.py")
"""What has one process for all of its tests, because it shares what takes long to start."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: two for each processor, because half of a test's time is waiting for the kernel."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out single tests, the largest of TOGETHER first."""
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415 - the emulated machine goes without xdist

    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = lambda nodeid: next(
        (each for each in TOGETHER if nodeid.startswith(each)), nodeid
    )
    return scheduling


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers begin with guests, so that the last tests of a run are short and all workers end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("vm") is None)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Fails a test that changes what a signal does to its process, which runs the next tests, and undoes it."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)}
    yield
    changed = {each: handler for each, handler in before.items() if signal.getsignal(each) is not handler}
    for each, handler in changed.items():
        signal.signal(each, handler)
    assert not changed


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
    """The folder with cnitool, host-local, dhcp, tuning and bandwidth, as their project released them."""
    return CLIENTS.get()
