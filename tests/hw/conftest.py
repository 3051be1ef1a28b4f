"""Tests on an emulated SR-IOV NIC: on the host collected as usual, and then run, by name, inside lab/hw.py's machine.

The machine is started with the first of them. A test that ends the machine fails, and the next one gets another.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.runner import runtestprotocol

from cni.attach.call import Request
from cni.plugin import handle
from lab import hw
from lab.assets import hardware
from lab.assets.cache import CHECKOUT, AssetError
from lab.hw import Root
from lab.wire import Netns
from tests.hw import nic
from tests.runner import Answer, Plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HERE = Path(__file__).resolve().parent
_MACHINE = pytest.StashKey[hw.Machine]()

try:
    if not hw.inside():
        hardware.files()
    left_out = ""
except AssetError as error:
    left_out = str(error)
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    return f"tests/hw is left out: {left_out}" if left_out else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """On the host: have it run inside, and report what was reported there."""
    if hw.inside() or _HERE not in item.path.parents:  # this hook is asked about all tests
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports: list[pytest.TestReport] = []
    call = pytest.CallInfo.from_call(
        lambda: reports.extend(_run_inside(item, nextitem)),
        when="call",
        reraise=(KeyboardInterrupt, pytest.exit.Exception),
    )
    if call.excinfo:
        reports.append(pytest.TestReport.from_item_and_call(item, call))
        _close(item.config)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_inside(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[pytest.TestReport]:
    config = item.config
    if _MACHINE not in config.stash:
        config.stash[_MACHINE] = hw.Machine(f"{hw.PYTEST} {_HERE.relative_to(CHECKOUT)}")
        config.add_cleanup(lambda: _close(config))
    for answer in config.stash[_MACHINE].ask(item.nodeid, nextitem and nextitem.nodeid):
        report: pytest.TestReport = config.hook.pytest_report_from_serializable(config=config, data=answer)
        yield report


def _close(config: pytest.Config) -> None:
    if machine := config.stash.get(_MACHINE, None):
        del config.stash[_MACHINE]
        machine.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Inside: run what the host names, until it is done."""
    if not hw.inside():
        return None
    items = {item.nodeid: item for item in session.items}
    to_serializable = session.config.hook.pytest_report_to_serializable
    for (name, following), answer in hw.requests():
        for report in runtestprotocol(items[name], log=False, nextitem=items.get(following)):
            answer(to_serializable(config=session.config, report=report))
        answer(None)
    return True


@pytest.fixture(scope="session")
def node() -> Root:
    """The machine's first namespace, with all NICs named and up."""
    root = Root()
    hw.name_all()
    root.wait_until_up(*hw.NICS, *hw.WIRES)
    return root


@pytest.fixture
def bare(node: Root) -> Iterator[nic.Nic]:
    """A NIC without VFs; and so it is left."""
    nic.PF0.make_vfs(0)
    yield nic.PF0
    nic.PF0.make_vfs(0)


class Resident(Plugin):
    """The plugin in this process, as the agent has it: to start it takes seconds on an emulated CPU."""

    def execute(self, variables: dict[str, str], stdin: bytes) -> Answer:
        done = handle(Request(variables, stdin), self.given())
        return Answer(done.status, done.stdout, "")


@pytest.fixture
def executable(node: Root, tmp_path: Path) -> Plugin:
    """The installed vmtap on this machine, with no policy and no state yet."""
    return Plugin(node=node, state=tmp_path / "state", policy=tmp_path / "interfaces.yaml")


@pytest.fixture
def plugin(node: Root, tmp_path: Path) -> Plugin:
    """The same without its executable; they share policy and state."""
    return Resident(node=node, state=tmp_path / "state", policy=tmp_path / "interfaces.yaml")


@pytest.fixture
def pods() -> Iterator[Callable[[], Netns]]:
    """Makes namespaces for pods, as a runtime's."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(Netns("pod"))
