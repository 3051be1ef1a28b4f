"""metrics.py: the text format, with the reference client's parser as the second opinion; and what the agent counts."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cni.agent.metrics import SECONDS, Registry
from cni.names import escaped
from lab.wire import NIC
from tests.agent.conftest import Agent
from tests.agent.test_broker import ASK, Client
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.wire import Lab

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    """Every sample, by name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _render(registry: Registry) -> str:
    def failed(name: str, error: Exception) -> None:
        raise AssertionError(name) from error

    return registry.render(failed).decode()


@given(st.lists(st.tuples(st.text(), st.sampled_from(["a", "b"])), max_size=20))
def test_a_counter_counts_under_any_label(incremented: list[tuple[str, str]]) -> None:
    registry = Registry()
    counter = registry.counter("c_total", "Some.", "any", "kind")
    for values in incremented:
        counter.inc(*values)
    counted = parse(_render(registry))
    assert sum(counted.values()) == len(incremented)
    for any_, kind in incremented:
        assert counted["c_total", (("any", escaped(any_)), ("kind", kind))] >= 1


def test_what_has_no_labels_is_there_from_the_start() -> None:
    registry = Registry()
    registry.counter("c_total", "Some.")
    gauge = registry.gauge("g", "Some.")
    assert parse(_render(registry)) == {("c_total", ()): 0, ("g", ()): 0}
    gauge.set(2.5)
    gauge.inc(by=-1)
    assert parse(_render(registry))["g", ()] == 1.5


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_a_histograms_buckets_hold_what_is_not_above_them(seconds: list[float]) -> None:
    registry = Registry()
    histogram = registry.histogram("h_seconds", "Some.", "command")
    for each in seconds:
        histogram.observe(each, "ADD")
    found = parse(_render(registry))
    for bound in (*SECONDS, float("inf")):
        label = "+Inf" if bound == float("inf") else str(bound)
        expected = sum(each <= bound for each in seconds)
        assert found["h_seconds_bucket", (("command", "ADD"), ("le", label))] == expected
    assert found["h_seconds_count", (("command", "ADD"),)] == len(seconds)
    assert found["h_seconds_sum", (("command", "ADD"),)] == pytest.approx(sum(seconds))


def test_one_that_cannot_be_looked_up_hides_no_other() -> None:
    registry, failed = Registry(), []

    def look() -> dict[tuple[str, ...], float]:
        raise OSError("no")

    registry.computed("s", "Some.", look=look)
    registry.counter("c_total", "Some.").inc()
    text = registry.render(lambda name, _: failed.append(name)).decode()
    assert parse(text) == {("c_total", ()): 1}
    assert failed == ["s"]


def test_a_mapping_that_is_the_same_is_not_rendered_again() -> None:
    registry = Registry()
    values: dict[tuple[str, ...], float] = {("x",): 1}
    registry.computed("s", "Some.", "a", look=lambda: values)
    before = _render(registry)
    values["y",] = 2
    assert _render(registry) == before
    values = {**values}
    assert parse(_render(registry)) == {("s", (("a", "x"),)): 1, ("s", (("a", "y"),)): 2}


def test_a_name_is_declared_once() -> None:
    registry = Registry()
    registry.counter("c_total", "Some.")
    with pytest.raises(ValueError, match="twice"):
        registry.gauge("c_total", "Some.")


def test_threads_lose_no_count() -> None:
    registry = Registry()
    counter, histogram = registry.counter("c_total", "Some.", "x"), registry.histogram("h", "Some.")

    def work() -> None:
        for _ in range(2000):
            counter.inc("y")
            histogram.observe(0.1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = parse(_render(registry))
    assert found["c_total", (("x", "y"),)] == found["h_count", ()] == 8000


@pytest.fixture
def agent(lab: Lab, tmp_path: Path) -> Iterator[Agent]:
    made = Agent(lab.node, tmp_path / "run", tmp_path / "interfaces.yaml", flags=("--metrics", "127.0.0.1:0"))
    made.policy.write_text(
        f"interfaces: [{{name: data, source: {{dev: {NIC}}}, type: ethernet, modes: [vepa, pepa], capacity: 7}}]"
    )
    yield made.start()
    made.end()


def _scrape(agent: Agent) -> Samples:
    status, kind, text = agent.get("/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert agent.get("/metrics", "HEAD")[2] == ""
    return parse(text)


def test_what_the_agent_counts(agent: Agent, lab: Lab) -> None:
    shim = agent.shim()
    data = config(interface="data", mode="vepa")
    for container in ("c1", "c2"):
        shim("ADD", data, netns=lab.pod(), container=container).ok()
    shim("ADD", config(interface="data", mode="pepa"), netns=lab.pod(), container="c3").ok()
    shim("ADD", config(interface="else"), netns=lab.pod()).error(7)
    shim("DEL", data, container="c2").ok()
    shim("JUNK\n", data).error(4)
    for _ in range(6):  # it answers first, then counts, then logs, each in a thread of its own
        agent.wait_for("request")
    found = _scrape(agent)

    def operations(command: str, code: int) -> float:
        return found["vmtap_operations_total", (("code", str(code)), ("command", command))]

    assert [operations("ADD", 0), operations("ADD", 7), operations("DEL", 0)] == [3, 1, 1]
    assert operations("other", 4) == 1
    assert found["vmtap_operation_duration_seconds_count", (("command", "ADD"),)] == 4
    assert found["vmtap_operations_in_flight", ()] == 0

    def attachments(mode: str) -> float:
        labels = (("device", "macvtap"), ("interface", "data"), ("mode", mode), ("source", NIC))
        return found["vmtap_attachments", labels]

    assert [attachments("vepa"), attachments("pepa")] == [1, 1]
    assert found["vmtap_interface_capacity", (("interface", "data"),)] == 7
    assert found["vmtap_policy_valid", ()] == 1
    assert found["vmtap_reconcile_failures_total", ()] == 0
    assert found["process_resident_memory_bytes", ()] > 1 << 20


def test_what_the_broker_counts(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    agent.shim()("ADD", config(interface="data", mode="vepa", queues=2), netns=pod).ok()
    with Client(agent, pod, ASK) as launcher:
        assert launcher.ask(queues=2)[0]["fds"] == 2
        assert launcher.ask(queues=3)["code"] == 4
    agent.wait_for("fds given to a launcher")  # they are on their way first, then counted
    found = _scrape(agent)
    assert found["vmtap_broker_fds_total", ()] == 2
    assert found["vmtap_broker_refusals_total", (("code", "4"),)] == 1


def test_a_bad_policy_is_seen(agent: Agent) -> None:
    agent.policy.write_text("interfaces: 7")
    found = _scrape(agent)
    assert found["vmtap_policy_valid", ()] == 0
    assert found["vmtap_interface_capacity", (("interface", "data"),)] == 7  # the last good one is in force
