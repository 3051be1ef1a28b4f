"""docs/support.md: the versions that it names are those of the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from unittest.mock import ANY

import pytest

from lab.assets import kind, programs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/support.md").read_text()
UP = (ROOT / "deploy/kind/up").read_text()


def _row(begin: str) -> str:
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| {begin}")]
    return row


def _versions(*modules: str) -> list[str]:
    """Those of module@vVERSION."""
    return [module.rpartition("@v")[2] for module in modules]


def _of(variable: str) -> str:
    """The default of a variable of deploy/kind/up, without the v."""
    [found] = re.findall(rf"\$\{{{variable}:-v([\d.]+)\}}", UP)
    return str(found)


_KUBERNETES, _CONTAINERD, _ETCD = _versions(*programs._CLUSTER)
_NODE = re.findall(r"kindest/node:v([\d.]+)", (ROOT / "deploy/kind/cluster.yaml").read_text())[0]


@pytest.mark.parametrize(
    ("row", "versions"),
    [
        ("CNI: cnitool", _versions(programs._CNITOOL)),
        ("the reference plugins", [programs.PLUGINS_VERSION.removeprefix("v")]),
        ("Kubernetes and etcd", [_KUBERNETES, _ETCD]),
        ("containerd, below", [_CONTAINERD]),
        ("Helm, kustomize", _versions(*programs._MANIFEST_TOOLS)),
        ("the types of KubeVirt", [version.removeprefix("v") for version in programs.KUBEVIRT]),
        ("resource claims on two workers", [_CONTAINERD]),
        ("kind, docker", [*_versions(kind.KIND_MODULE), ANY, _KUBERNETES]),
        ("Multus ", [_of("MULTUS"), _of("KUBEVIRT")]),
        ("the node image", [_NODE, _KUBERNETES]),
    ],
)
def test_a_version_is_that_of_the_code(row: str, versions: list[str]) -> None:
    assert re.findall(r"\d+\.\d+\.\d+", _row(row)) == versions


def test_python_is_the_oldest_that_is_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"| {project['requires-python'].removeprefix('>=')} |" in _row("Python")


def test_the_commands_name_what_is_there() -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make ([a-z-]+)", PAGE)) <= {*targets, "help"}
    for path in re.findall(r"\b(?:tests|deploy|lab|\.github)/[\w./-]*\w", PAGE):
        assert (ROOT / path).exists(), path
