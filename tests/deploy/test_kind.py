"""deploy/kind and the workflows without a registry: deploy/kind/up runs with programs that only log their commands.

tests/test_project.py has shellcheck for the scripts.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
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


FAKE = r"""#!/bin/bash
# Logs its command line. Fails if FAKE_FAIL matches it, and once if FAKE_FAIL_ONCE does; else answers as in a cluster in
# which everything works.
line="${0##*/} $*"
echo "$line" >>"$FAKE/log"
if [[ $line =~ ${FAKE_FAIL:-^$} ]]; then
    echo "fake: no route to host" >&2
    exit "${FAKE_STATUS:-1}"
fi
if [[ $line =~ ${FAKE_FAIL_ONCE:-^$} && ! -e $FAKE/failed ]]; then
    touch "$FAKE/failed"
    exit 1
fi
case $line in
"kind get clusters") [[ ! -e $FAKE/cluster ]] || echo vmtap ;;
"kind create cluster"*) touch "$FAKE/cluster" ;;
*" get pods -l app.kubernetes.io/name=vmtap -o name") echo pod/agent ;;
*" get pods --no-headers") echo "stuck 0/1 ImagePullBackOff 0 1m" ;;
*" get pod vm "* | *" get vmi alpha "*) echo "${FAKE_NODES:-vmtap-worker vmtap-worker2}" ;;
*" get nodes -o jsonpath="*) printf '%s\n' "${FAKE_DEVICES:-vmtap-worker 16}" "vmtap-worker2 16" ;;
*" logs "*) echo "guest: 10.1.0.14 answers: 64 bytes" ;;
*" vmtapctl doctor") echo "0 errors, 1 warning, 9 ok" ;;
"docker run"*) echo "$FAKE_CONSOLE" ;;
*" -f -") cat >/dev/null ;;
esac
"""
OPERATOR = "apply -f https://github.com/kubevirt/.*/kubevirt-operator.yaml"
CRD = "wait crd/kubevirts.kubevirt.io --for condition=Established"
CR = "apply -f https://github.com/kubevirt/.*/kubevirt-cr.yaml"
MULTUS = "apply -f https://raw.githubusercontent.com/.*/multus-daemonset-thick.yml"


class Up:
    """deploy/kind/up with fake programs in a folder of its own. `commands` are those of the last run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.commands: list[str] = []
        for name in ("docker", "kind", "kubectl"):
            program = folder / name
            program.write_text(FAKE)
            program.chmod(0o755)

    def __call__(self, *words: str, status: int = 0, fail: str = "^$", **env: str) -> str:
        """Runs it and returns its output. fail: a regular expression of the command lines that fail."""
        log = self._folder / "log"
        log.write_text("")
        path = f"{self._folder}:{os.environ['PATH']}"
        given = {"PATH": path, "FAKE": str(self._folder), "FAKE_FAIL": fail, "PATIENCE": "0", **env}
        done = subprocess.run(
            [ROOT / "deploy/kind/up", *words], env=given, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        self.commands = log.read_text().splitlines()
        return done.stdout + done.stderr

    def first(self, pattern: str) -> int:
        """The number of the first command that has the pattern."""
        return next(number for number, line in enumerate(self.commands) if re.search(pattern, line))

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.commands)


@pytest.fixture
def up(tmp_path: Path) -> Up:
    return Up(tmp_path)


def test_the_order_of_a_first_run(up: Up) -> None:
    text = up()
    order = [
        "^docker build", "^kind create cluster", "wait node --all", "^kind load", MULTUS,
        "wait crd/network-attachment-definitions.k8s.cni.cncf.io", "status daemonset/kube-multus-ds",
        OPERATOR, CRD, CR,
        "apply -k deploy/kustomize/overlays/kind$", "status daemonset/vmtap", "get nodes -o jsonpath=", "useEmulation",
        "binding.yaml", "wait kubevirt/kubevirt", "kubectl kustomize .*deploy/kind/vms", "wait vm/alpha vm/beta",
        "get vmi", "vmtapctl list",
    ]  # fmt: skip
    numbers = [up.first(pattern) for pattern in order]
    assert numbers == sorted(numbers)
    assert "doctor: 0 errors" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("words", [(), ("--without-kubevirt",)])
def test_a_second_run_changes_nothing(up: Up, words: tuple[str, ...]) -> None:
    """It repeats commands that change nothing when they are repeated, and deletes no pod that can run."""
    up(*words)
    first = up.commands
    up(*words)
    assert [line for line in first if line not in up.commands] == [
        "kind create cluster --config deploy/kind/cluster.yaml"
    ]
    assert set(up.commands) <= set(first)
    deletes = [line for line in up.commands if re.search(r"\b(delete|restart|replace|scale)\b", line)]
    assert all(line.endswith("-l app=vm --field-selector status.phase=Failed") for line in deletes)


def test_without_kubevirt(up: Up) -> None:
    text = up("--without-kubevirt")
    assert not up.has("kubevirts.kubevirt.io|-n kubevirt|releases/download")
    order = [
        "build .*--target launcher", "build -t vmtap-vm:example .*deploy/examples/vm-image",
        "load .*vmtap-vm:example",
        "apply -k deploy/kustomize/overlays/kind-broker", "status daemonset/vmtap", "vmtapctl doctor",
        "get nodes -o jsonpath=", "vm-pod-device.yaml",
        "wait pod/vm pod/vm-device", "logs vm ", "logs vm-device ",
    ]  # fmt: skip
    numbers = [up.first(pattern) for pattern in order]
    assert numbers == sorted(numbers)
    assert "guest: 10.1.0.14 answers" in text


@pytest.mark.parametrize(
    "fail", [MULTUS + "|get daemonset/kube-multus-ds", "status daemonset/kube-multus-ds"]
)
def test_where_multus_cannot_be_had(up: Up, fail: str) -> None:
    text = up(status=3, fail=fail)
    assert "Multus is not installed" in text
    assert "no route to host" in text
    assert up.has("status daemonset/vmtap")
    assert not up.has("vm/alpha|vm-pod|releases/download")


@pytest.mark.parametrize(
    "fail", [OPERATOR + "|get deployment/virt-operator", "status deployment/virt-operator"]
)
def test_where_kubevirt_cannot_be_had(up: Up, fail: str) -> None:
    """The VMs are pods then."""
    text = up(status=3, fail=fail)
    assert "KubeVirt is not installed" in text
    assert up.has("wait pod/vm pod/vm-device")
    assert not up.has("vm/alpha")


def test_what_an_earlier_run_has_installed_is_enough(up: Up) -> None:
    text = up(fail="apply -f https:")
    assert "that the cluster has stays" in text
    assert up.has("wait vm/alpha vm/beta")


@pytest.mark.parametrize(
    ("words", "fail", "step"),
    [
        ((), "wait vm/alpha", "VMs that ping each other: not in 0 s"),
        ((), "wait kubevirt/kubevirt", "KubeVirt: not in 0 s"),
        (("--without-kubevirt",), "wait pod/vm", "the pods of the VMs: not in 0 s"),
        (("--without-kubevirt",), "logs vm", "guests that ping each other: not in 0 s"),
        (("--without-kubevirt",), "build -t vmtap-vm", "there is no image for the VMs"),
        ((), "vmtapctl doctor", "doctor reports errors"),
    ],
)
def test_a_step_that_fails_is_named_with_the_reason(
    up: Up, words: tuple[str, ...], fail: str, step: str
) -> None:
    text = up(*words, status=1, fail=fail)
    assert step in text
    assert "what runs where" in text
    if "not in" in step:
        assert "pod stuck: 0/1 ImagePullBackOff" in text


@pytest.mark.parametrize("fail", ["useEmulation", "apply -f -$", "vmtapctl doctor"])
def test_what_is_not_there_yet_is_tried_again(up: Up, fail: str) -> None:
    """A webhook, or a resource of the agent."""
    up(FAKE_FAIL_ONCE=fail, PATIENCE="1")
    assert sum(bool(re.search(fail, line)) for line in up.commands) >= 2


@pytest.mark.parametrize(
    "fail", ["^docker build", "^kind create", "wait node", "apply -k", "daemonset/vmtap"]
)
def test_without_this_there_is_nothing_to_show(up: Up, fail: str) -> None:
    text = up(status=1, fail=fail)
    assert "what runs where" not in text
    [*_, step] = re.findall(r"^== \d+ s: (.*)", text, re.M)
    assert text.endswith(f"stopped: {step}\n")


@pytest.mark.parametrize("words", [(), ("--without-kubevirt",)])
def test_vms_on_one_node_prove_nothing(up: Up, words: tuple[str, ...]) -> None:
    """Their frames are not on the wire between the nodes."""
    text = up(*words, status=1, FAKE_NODES="vmtap-worker vmtap-worker")
    assert "not on two nodes: vmtap-worker vmtap-worker\n" in text


@pytest.mark.parametrize("devices", ["vmtap-worker ", "vmtap-worker 0"])
def test_a_node_without_devices_is_named(up: Up, devices: str) -> None:
    """If the VMs start before a kubelet has its devices, both are on the other node."""
    text = up(status=1, FAKE_DEVICES=devices)
    assert "vmtap-worker has no devices\n" in text
    assert "worker2 has no" not in text


@pytest.mark.parametrize(("words", "overlay"), [((), "kind"), (("--without-kubevirt",), "kind-broker")])
def test_a_later_run_with_multus_changes_no_agent(up: Up, words: tuple[str, ...], overlay: str) -> None:
    """The broker does not depend on whether Multus could be had."""
    for status, fail in ((3, MULTUS + "|get daemonset/kube-multus-ds"), (0, "^$")):
        up(*words, status=status, fail=fail)
        assert up.has(f"apply -k deploy/kustomize/overlays/{overlay}$")


def test_a_download_that_takes_too_long_is_named(up: Up) -> None:
    """timeout(1) exits with 124, and kubectl has printed nothing."""
    text = up(status=3, fail=MULTUS + "|get daemonset/kube-multus-ds", FAKE_STATUS="124", PATIENCE="2")
    assert "not in 240 s" in text


def test_kvm(up: Up) -> None:
    """It is what counts that a guest has booted. On a machine without /dev/kvm, none is tried."""
    there = Path("/dev/kvm").exists()
    for kvm, console, used in (
        ("auto", "[ 1.5] reboot: Power down", there),
        ("auto", "qemu: could not access KVM kernel module", False),
        ("yes", "", True),
        ("no", "[ 1.5] reboot: Power down", False),
    ):
        up(KVM=kvm, FAKE_CONSOLE=console)
        assert up.has(f'"useEmulation": {"false" if used else "true"}'), (kvm, console)
        assert up.has("^docker run .*--device /dev/kvm .*-accel kvm") is (kvm == "auto" and there)


def test_variables(up: Up) -> None:
    up(KUBEVIRT="v1.7.0", MULTUS="v4.3.0")
    assert up.has("kubevirt/releases/download/v1.7.0/")
    assert up.has("multus-cni/v4.3.0/")
    up(KUBEVIRT_RELEASE="/srv/kubevirt", MULTUS_MANIFEST="/srv/multus.yml")
    assert up.has("apply -f /srv/kubevirt/kubevirt-cr.yaml")
    assert up.has("apply -f /srv/multus.yml")
    assert not up.has("https:")


@pytest.mark.parametrize(
    ("words", "env", "status", "text"),
    [
        (("--help",), {}, 0, "exit status:"),
        (("--without-multus",), {}, 2, "unknown argument '--without-multus'"),
        (("vmtap",), {}, 2, "unknown argument 'vmtap'"),
        ((), {"KVM": "maybe"}, 2, "give yes, no or auto"),
        ((), {"PATIENCE": "-1"}, 2, "give a number"),
        ((), {"PATIENCE": "08"}, 2, "give a number"),
    ],
)
def test_the_command_line(
    up: Up, words: tuple[str, ...], env: dict[str, str], status: int, text: str
) -> None:
    assert text in up(*words, status=status, **env)
    assert up.commands == []


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


def test_the_probes_ping_the_other_vm() -> None:
    """deploy/kubevirt has the addresses."""
    documents = list(yaml.safe_load_all((ROOT / "deploy/kubevirt/macvtap.yaml").read_text()))
    addresses = {
        each["metadata"]["name"]: re.findall(r"\b10\.[0-9.]+", yaml.safe_dump(each))
        for each in documents
        if each["kind"] == "VirtualMachine"
    }
    patches = yaml.safe_load((ROOT / "deploy/kind/vms/kustomization.yaml").read_text())["patches"]
    pinged = {each["target"]["name"]: re.findall(r"\b10\.[0-9.]+", each["patch"]) for each in patches}
    assert pinged == {"alpha": addresses["beta"], "beta": addresses["alpha"]}


def test_the_pods_ping_each_other() -> None:
    lines = [(ROOT / f"deploy/examples/{name}.yaml").read_text() for name in ("vm-pod", "vm-pod-device")]
    ends = [re.findall(r"address=([0-9.]+)/24 peer=([0-9.]+)", each) for each in lines]
    [[one], [other]] = ends
    assert one == (other[1], other[0])
    [image] = {yaml.safe_load(each)["spec"]["containers"][0]["image"] for each in lines}
    assert f"vm_image={image} " in UP


def test_the_vms_image_is_made_of_the_launchers() -> None:
    """Of this version: it is built here, so it has no digest."""
    dockerfile = (ROOT / "deploy/examples/vm-image/Dockerfile").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG LAUNCHER=ghcr.io/vmtap/vmtap-launcher:{version}\n" in dockerfile
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.M)) == {"${LAUNCHER}"}


@pytest.mark.parametrize(("name", "script"), STEPS, ids=[name for name, _ in STEPS])
def test_shellcheck_of_the_workflow(name: str, script: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
