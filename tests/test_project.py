"""The project's own rules, as tests: linters, types, layers, and what a short-lived process may import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.runner import BIN, Plugin, config
from tests.waiting import LIMIT

if TYPE_CHECKING:
    from lab.wire import Lab

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    path
    for path in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if (ROOT / path).is_file()
    and (ROOT / path).read_bytes()[:64].split(b"\n")[0]
    in (b"#!/bin/sh", b"#!/usr/bin/env bash", b"#!/bin/bash")
]

PAGES = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()

HEAVY = {
    "argparse",
    "asyncio",
    "dataclasses",
    "email",
    "http",
    "importlib.metadata",
    "inspect",
    "ipaddress",
    "jsonschema",
    "logging",
    "pyroute2",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "typing",
    "urllib",
    "yaml",
}
"""What costs a pod's start milliseconds and is of no use to the ADD or DEL of a macvtap without policy and IPAM."""

AGENT_HEAVY = {
    *{
        "argparse",
        "ast",
        "asyncio",
        "concurrent",
        "dataclasses",
        "email",
        "grpc",
        "hashlib",
        "importlib.metadata",
    },
    *{
        "inspect",
        "ipaddress",
        "jsonschema",
        "pyroute2",
        "shutil",
        "ssl",
        "subprocess",
        "tempfile",
        "typing",
        "urllib",
    },
}
"""What costs an agent memory for as long as it runs, and is of no use to one without device plugin."""

MODULES = """
import json, os, sys
from cni.__main__ import main
status = main()
os.write(2, json.dumps(sorted(sys.modules)).encode())
sys.exit(status)
"""

AGENT_MODULES = """
import json, os, signal, sys
from cni.agent.__main__ import main

def ready(signals):
    os.write(1, json.dumps(sorted(sys.modules)).encode())
    return signal.SIGTERM

signal.sigwait = ready
sys.exit(main())
"""


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
    ],
    ids=" ".join,
)
def test_linter(command: list[str]) -> None:
    done = subprocess.run(
        [BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    done = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_an_attachments_life_imports_nothing_heavy(lab: Lab, plugin: Plugin) -> None:
    pod = lab.pod()
    for command in ("ADD", "DEL"):
        done = subprocess.run(
            lab.node.argv([sys.executable, "-I", "-c", MODULES]),
            input=json.dumps(config(source="eth1", mode="bridge")).encode(),
            env=plugin.environment(command, pod),
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert not HEAVY & set(json.loads(done.stderr)), command


@pytest.mark.parametrize(
    ("flags", "heavy"),
    [([], AGENT_HEAVY), (["--device-plugin"], {"ssl", "argparse", "jsonschema", "pyroute2"})],
)
def test_an_agent_keeps_nothing_heavy(lab: Lab, flags: list[str], heavy: set[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="vmtap-") as folder:  # short, as the kubelet's folder has sockets
        policy = Path(folder) / "interfaces.yaml"
        policy.write_text("interfaces: [{name: data, source: {dev: eth1}}]\n")
        files = ["--run", f"{folder}/run", "--policy", str(policy), f"--kubelet={folder}/kubelet"]
        served = ["--metrics", "127.0.0.1:0", "--health=127.0.0.1:0", "--delegate-seconds", "9", *flags]
        done = subprocess.run(
            lab.node.argv([sys.executable, "-I", "-c", AGENT_MODULES, *files, *served]),
            capture_output=True,
            timeout=LIMIT,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout))
    assert ("grpc" in modules) == bool(flags)
    assert "yaml" in modules
    assert not heavy & modules


def test_ssl_can_be_imported_after_grpc() -> None:
    """The agent loads gRPC without it, and the driver of resource claims speaks TLS to the API server."""
    script = (
        "import sys; from cni.agent import local_grpc; local_grpc.load(); local_grpc.load(); "
        "assert 'grpc' in sys.modules and 'asyncio' in sys.modules and 'ssl' not in sys.modules; "
        "from cni.agent.dra import api; import ssl, http.client; "
        "http.client.HTTPSConnection('host', context=ssl.create_default_context()); local_grpc.load(); "
        "assert sys.modules['ssl'] is ssl"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True)


def test_the_executable_ends_with_its_answer() -> None:
    """It skips the interpreter's own end, which takes 5 ms."""
    script = "import atexit, os; atexit.register(os.write, 1, b'late'); from cni.__main__ import run; run()"
    for command, status in (("VERSION", 0), ("NONE", 1)):
        env = {"CNI_COMMAND": command}
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=b'{"cniVersion":"1.0.0"}',
            capture_output=True,
            env=env,
            check=False,
        )
        assert done.returncode == status
        assert json.loads(done.stdout)["cniVersion"] == "1.0.0"
        assert (b"CNI_COMMAND" in done.stderr) == bool(status)


def test_importing_the_package_costs_nothing() -> None:
    script = "import sys; before = set(sys.modules); import cni; print(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.split() == ["cni"]


def test_the_image_has_what_was_tested() -> None:
    """deploy/requirements.lock is the part of requirements.lock that is needed to run."""

    def pins(file: str) -> set[str]:
        lines = (ROOT / file).read_text().splitlines()
        return {line.split()[0] for line in lines if "==" in line and not line.startswith((" ", "#"))}

    image, tested = pins("deploy/requirements.lock"), pins("requirements.lock")
    assert image
    assert image <= tested
    with open(ROOT / "pyproject.toml", "rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    names = {pin.partition("==")[0] for pin in image}
    assert {re.split("[<>=]", each)[0] for each in wanted} <= names


def test_relative_links_lead_to_files() -> None:
    missing = [
        f"{page}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", (ROOT / page).read_text())
        if not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert missing == []


def test_prose_has_at_most_120_columns() -> None:
    """Tables, images and code blocks may be wider."""
    wide = []
    for page in PAGES:
        code = False
        for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            if len(line) > 120 and not code and not line.startswith(("|", "!")):
                wide.append(f"{page}:{number}")
    assert wide == []
