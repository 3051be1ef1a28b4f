"""deploy/kind and the workflows, which take registries to run: what of them can be held against the rest is.

tests/test_project.py has shellcheck for the scripts.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
UP = (ROOT / "deploy/kind/up").read_text()
WORKFLOWS: list[dict[str, Any]] = [
    yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").iterdir())
]
STEPS: list[tuple[str, str]] = [
    (f"{workflow['name']} {name} {number}", step["run"])
    for workflow in WORKFLOWS
    for name, job in workflow["jobs"].items()
    for number, step in enumerate(job.get("steps", ()))
    if "run" in step
]


def test_what_the_scripts_name_is_there() -> None:
    for path in re.findall(r"\b(?:deploy|\.ci)/[\w./-]*\w", UP + yaml.safe_dump_all(WORKFLOWS)):
        assert (ROOT / path).exists(), path


def test_the_cluster_is_the_one_that_is_asked_for() -> None:
    cluster = yaml.safe_load((ROOT / "deploy/kind/cluster.yaml").read_text())
    assert cluster["name"] == "vmtap"
    assert "kind-vmtap" in UP


def test_the_image_is_the_manifests() -> None:
    [image] = yaml.safe_load((ROOT / "deploy/kustomize/base/kustomization.yaml").read_text())["images"]
    assert f"image={image['newName']}:$version" in UP


def test_the_vms_are_the_examples() -> None:
    """The probes ask for the addresses that deploy/kubevirt gives the two."""
    documents = list(yaml.safe_load_all((ROOT / "deploy/kubevirt/macvtap.yaml").read_text()))
    addresses = {
        each["metadata"]["name"]: re.search(r"10\.[0-9.]+", yaml.safe_dump(each))
        for each in documents
        if each["kind"] == "VirtualMachine"
    }
    pairs = dict(re.findall(r"\b(alpha|beta):([0-9.]+)", UP))
    assert addresses.keys() == pairs.keys() == {"alpha", "beta"}
    assert addresses["beta"]
    assert addresses["alpha"]
    assert (pairs["alpha"], pairs["beta"]) == (addresses["beta"][0], addresses["alpha"][0])


@pytest.mark.parametrize(("name", "script"), STEPS, ids=[name for name, _ in STEPS])
def test_shellcheck_of_the_workflow(name: str, script: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
