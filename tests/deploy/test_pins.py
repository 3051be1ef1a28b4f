"""What is downloaded to build, test or release is named by its content: actions by commit, images by digest, packages
by hash. Each rule is also held against an input that breaks it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.runner import BIN

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FILES = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.splitlines()
WORKFLOWS = [path for path in FILES if path.startswith(".github/workflows/")]
LOCKS = [path for path in FILES if path.endswith(".lock")]

ACTION = re.compile(r"uses:\s*[\w.-]+(/[\w.-]+)+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
DIGEST = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
"""An image's name, with the tag that the digest had."""


def unpinned_actions(workflow: str) -> Iterator[str]:
    for line in workflow.splitlines():
        used = re.search(r"\buses:\s*(?!\./|#)\S.*", line)
        if used and not ACTION.fullmatch(used[0].rstrip()):
            yield used[0]


def unpinned_images(workflow: str) -> Iterator[str]:
    """Of `container`, `services` and each `docker run` or `docker pull`; those that are built are named by variable."""
    for job in yaml.safe_load(workflow)["jobs"].values():
        container: Any = job.get("container", ())
        services: list[Any] = [*job.get("services", {}).values()]
        for each in [container, *services]:
            if each:
                image = each if isinstance(each, str) else each["image"]
                if not DIGEST.fullmatch(image):
                    yield image
        for step in job.get("steps", ()):
            for command in re.findall(r"docker (?:run|pull)\b(?:.*\\\n)*.*", step.get("run", "")):
                if not DIGEST.search(command):
                    yield command


def unpinned_bases(dockerfile: str) -> Iterator[str]:
    """The images that FROM and COPY --from name, with the defaults of their ARGs, which are no stages."""
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", dockerfile, re.M))
    stages = set(re.findall(r"^FROM .* AS (\S+)", dockerfile, re.M | re.I))
    for name in re.findall(r"^FROM (?:--\S+ )*(\S+)|--from=(\S+)", dockerfile, re.M):
        image = re.sub(r"\$\{?(\w+)\}?", lambda found: arguments.get(found[1], ""), "".join(name))
        if image not in stages and image != "scratch" and not DIGEST.fullmatch(image):
            yield image


def unhashed(lock: str) -> Iterator[str]:
    """The requirements of a lock that have no version or no hash."""
    for requirement in re.sub(r"\\\n", "", re.sub(r"^\s*#.*\n", "", lock, flags=re.M)).splitlines():
        if not re.match(r"[\w.-]+==[\w.]+( ;.*?)?(\s+--hash=sha256:[0-9a-f]{64})+$", requirement.rstrip()):
            yield requirement


def unhashed_installs(script: str) -> Iterator[str]:
    """Each use of pip that takes packages from an index without their hashes."""
    for command in re.findall(r"\bpip(?:\"|')?,? +(?:\"|')?(?:install|wheel|download)\b.*", script):
        if "require-hashes" not in command and "no-deps" not in command:
            yield command


@pytest.mark.parametrize("path", WORKFLOWS)
def test_workflow(path: str) -> None:
    text = (ROOT / path).read_text()
    assert not [*unpinned_actions(text)]
    assert not [*unpinned_images(text)]
    for job in yaml.safe_load(text)["jobs"].values():
        for step in job.get("steps", ()):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_permissions() -> None:
    """No workflow has more than it says for each job, and no job that can sign runs code that it builds or installs."""
    for path in WORKFLOWS:
        text = (ROOT / path).read_text()
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] in ({}, {"contents": "read"})
        assert set(re.findall(r"secrets\.(\w+)", text)) <= {"GITHUB_TOKEN"}
        for job in workflow["jobs"].values():
            if "id-token" in job.get("permissions", ()):
                script = "\n".join(step.get("run", "") for step in job["steps"])
                assert not re.search(r"docker build\b|python|pip|make|deploy/kind|\.ci/", script)


def test_workflows_have_no_finding() -> None:
    strict = ("--offline", "--quiet", "--min-severity=medium")
    subprocess.run([BIN / "zizmor", *strict, ROOT / ".github"], check=True)


def test_one_action_has_one_commit() -> None:
    used = {use for path in WORKFLOWS for use in ACTION.finditer((ROOT / path).read_text())}
    names = [line.partition("@")[0] for line in {use[0] for use in used}]
    assert len(names) == len(set(names)), names


def test_images() -> None:
    assert not [*unpinned_bases((ROOT / "Dockerfile").read_text())]
    cluster = yaml.safe_load((ROOT / "deploy/kind/cluster.yaml").read_text())
    assert all(DIGEST.fullmatch(node["image"]) for node in cluster["nodes"])


@pytest.mark.parametrize("path", LOCKS)
def test_lock(path: str) -> None:
    text = (ROOT / path).read_text()
    assert "--hash" in text
    assert not [*unhashed(text)]


def test_locks_are_found() -> None:
    assert {
        "requirements.lock",
        "deploy/requirements.lock",
        "lab/assets/go.lock",
        "lab/fuzz/requirements.lock",
    } == set(LOCKS)
    assert WORKFLOWS


@pytest.mark.parametrize("path", ["Dockerfile", "lab/setup", "lab/assets/golang.py", *WORKFLOWS])
def test_pip_verifies_hashes(path: str) -> None:
    assert not [*unhashed_installs((ROOT / path).read_text())]


@pytest.mark.parametrize(
    "uses",
    [
        "actions/checkout@v4",
        "actions/checkout@main",
        "actions/checkout",
        "docker://alpine:3",
        "a/b/.github/workflows/x.yaml@v1",
        f"a/b@{'0' * 40}",
        f"a/b@{'0' * 39} # v1.0.0",
        f"a/b@{'0' * 40} # v1",
    ],
)
def test_an_action_without_a_commit_or_version_is_found(uses: str) -> None:
    assert [*unpinned_actions(f"      - uses: {uses}\n")] == [f"uses: {uses}"]


@pytest.mark.parametrize(
    "job",
    [
        {"container": "debian:12"},
        {"container": {"image": "debian"}},
        {"services": {"db": {"image": "postgres:17"}}},
        {"steps": [{"run": "docker run --rm \\\n  -v a:b \\\n  debian:12 true"}]},
        {"steps": [{"run": f"docker pull debian@sha256:{'0' * 63}"}]},
    ],
)
def test_an_image_without_a_digest_in_a_workflow_is_found(job: dict[str, Any]) -> None:
    assert len([*unpinned_images(yaml.safe_dump({"jobs": {"a": job}}))]) == 1


@pytest.mark.parametrize(
    "dockerfile",
    [
        "FROM debian:12\n",
        "FROM --platform=linux/amd64 debian AS a\n",
        "ARG BASE=python:3.12\nFROM ${BASE} AS a\nFROM a AS b\n",
        "ARG BASE\nFROM $BASE\n",
        f"FROM debian:12@sha256:{'0' * 64} AS a\nCOPY --from=busybox:1 /bin/sh /\n",
    ],
)
def test_a_base_without_a_digest_is_found(dockerfile: str) -> None:
    assert [*unpinned_bases(dockerfile)]


@pytest.mark.parametrize(
    "line",
    [
        "rich==14.0.0",
        f"rich>=13 --hash=sha256:{'0' * 64}",
        f"rich==14.0.0 \\\n    --hash=sha256:{'0' * 63}",
        "rich @ https://example.org/rich.whl",
        "git+https://example.org/rich",
    ],
)
def test_a_requirement_without_version_or_hash_is_found(line: str) -> None:
    hashes = " ".join(f"\\\n    --hash=sha256:{digit * 64}" for digit in "ab")
    good = f"attrs==26.1.0 ; sys_platform == 'win32' {hashes}\n"
    assert not [*unhashed(good)]
    assert [*unhashed(f"{good}    # via x\n{line}\n")]


@pytest.mark.parametrize(
    "command", ["pip install rich", '"$venv/bin/pip" install -q -r a.lock', "pip wheel ."]
)
def test_pip_without_hashes_is_found(command: str) -> None:
    assert [*unhashed_installs(command)]
