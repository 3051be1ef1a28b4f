"""deploy/kind/up, unmodified, as a user runs it on a docker without a cluster. The tests follow each other.

The lab's stand-in for Multus is in place of Multus, and KubeVirt cannot be had. The image of the VMs has packages of
Debian, which the build downloads. tests/deploy/test_kind.py has the order of the steps and their errors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from lab.assets.cache import CHECKOUT
from lab.process import PATIENCE
from tests.kind.conftest import lab, records

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.kind.cluster import Kind

NOWHERE = "/nonexistent"
"""Where a manifest cannot be had, on any machine."""
_RESTLESS = {"events", "events.events.k8s.io", "leases.coordination.k8s.io", "nodes"}
"""Kinds whose objects change while nothing happens."""


class Up:
    """A docker of the lab, and deploy/kind/up on it."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self, *words: str, status: int = 0, **variables: str) -> str:
        """Runs it and returns its output."""
        done = self.kind.docker.machine.run(
            ["sh", "-c", 'exec "$0" "$@" 2>&1', "deploy/kind/up", *words],
            cwd=CHECKOUT,
            env={**self.kind.environment(), **variables},
            check=False,
            timeout=4 * PATIENCE,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def state(self) -> dict[str, Any]:
        """What the API server has, by kind, namespace and name, each with its version; and the images of each node."""
        kinds = set(self.kind.kubectl("api-resources", "--verbs=list", "-o", "name").split()) - _RESTLESS
        found: dict[str, Any] = {}
        for each in self.kind.get(",".join(sorted(kinds)), "-A")["items"]:
            data = each["metadata"]
            name = f"{each['kind']} {data.get('namespace', '')}/{data['name']}"
            found[name] = (data.get("uid"), data.get("resourceVersion"))
        for node in self.kind.nodes():
            images = self.kind.on_node(node, "ctr -n k8s.io images list | awk '{print $1, $3}'")
            found[node] = sorted(images.splitlines())
        return found


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with lab(tmp_path_factory.mktemp("up"), internet=True) as kind:
        yield Up(kind)


def healthy(text: str, nodes: list[str]) -> bool:
    """Whether a run has reported that each node offers devices, and that doctor finds no error there."""
    offering = re.findall(r"^(\S+) +True +16$", text, re.M)
    return sorted(offering) == nodes and text.count("doctor: 0 errors") == len(nodes)


def test_the_first_run_shows_vms_on_two_workers(up: Up) -> None:
    """One on fds of the broker, and one on a device of the device plugin."""
    text = up("--without-kubevirt")
    rows = re.findall(r"^(\S+) +default +(\S+) +Running +true +0$", text, re.M)
    where = {vm: node for node, vm in rows}
    assert set(where) == {"vm", "vm-device"}
    assert sorted(where.values()) == up.kind.workers()
    assert healthy(text, up.kind.nodes())
    for vm, node in where.items():
        [record] = records(up.kind, node)
        assert bool(record["device_id"]) is (vm == "vm-device")
        assert " answers: 64 bytes" in up.kind.kubectl("logs", vm)


def test_a_second_run_changes_nothing(up: Up) -> None:
    before = up.state()
    text = up("--without-kubevirt")
    assert up.state() == before
    assert set(re.findall(r"^\S+/\S+ (created|configured|unchanged)$", text, re.M)) == {"unchanged"}
    assert "not yet present" not in text  # kind load
    assert healthy(text, up.kind.nodes())


def test_where_kubevirt_cannot_be_had_the_vms_are_pods(up: Up) -> None:
    before = up.state()
    text = up(status=3, KUBEVIRT_RELEASE=NOWHERE)
    assert f'the path "{NOWHERE}/kubevirt-operator.yaml" does not exist' in text
    assert "KubeVirt is not installed: the VMs are pods" in text
    assert up.state() == before
    assert healthy(text, up.kind.nodes())


def test_where_multus_cannot_be_had_the_agents_run(up: Up) -> None:
    """And so do the VMs of an earlier run."""
    up.kind.kubectl("-n", "kube-system", "delete", "daemonset", "kube-multus-ds", "--cascade=foreground")
    before = up.state()
    text = up("--without-kubevirt", status=3, MULTUS_MANIFEST=NOWHERE)
    assert f'the path "{NOWHERE}" does not exist' in text
    assert "Multus is not installed, so there are no VMs" in text
    assert up.state() == before
    assert healthy(text, up.kind.nodes())
