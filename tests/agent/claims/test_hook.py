"""vmtap-hook: a container of a claim starts only with exactly the claim's link and device, else it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.agent.dra.metadata import Metadata
from tests.agent.claims.conftest import in_pod
from tests.agent.test_shim import SOURCE
from tests.waiting import until

if TYPE_CHECKING:
    from lab.wire import Lab
    from tests.agent.claims.conftest import Node


def test_without_nri_the_hook_attaches(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    record = node.record(claim)
    assert record
    assert (record.claim, record.container_id, record.ifindex) == (True, claim.uid, claim.devices[0].ifindex)
    assert pod.links()["net0"]["ifindex"] == claim.devices[0].ifindex
    assert node.device(claim) == node.link(claim, pod)


def test_a_container_that_starts_again_finds_the_same_link(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare("vm", "data", "backup")
    node.hook(claim, pod).ok()
    before = pod.links()
    written = node.store.written_ns(claim.attachment(claim.devices[0]))
    node.hook(claim, pod).ok()
    node.hook(claim, pod).ok()
    assert pod.links() == before
    assert {"net0", "net1"} <= before.keys()
    assert node.store.written_ns(claim.attachment(claim.devices[0])) == written


def test_while_the_agent_is_away_the_container_fails(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    node.agent.end(signal.SIGKILL)
    node.hook(claim, pod, VMTAP_WAIT="0").refused("vmtapd does not answer")
    node.agent.start()
    node.hook(claim, pod).ok()


def test_an_agent_that_hangs_fails_the_container(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    with node.agent.stopped():
        node.hook(claim, pod, VMTAP_DEADLINE="1").refused("vmtapd does not answer")


def test_a_claim_that_is_not_prepared(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.claims.remove(claim.uid)
    node.hook(claim, pod).refused(claim.uid, "is not prepared on this node")
    assert "net0" not in pod.links()


def test_a_second_pod_with_the_claim_fails_and_the_first_keeps_its_link(node: Node, lab: Lab) -> None:
    first, second, claim = lab.pod(), lab.pod(), node.prepare("first")
    node.hook(claim, first).ok()
    before = first.links()
    node.hook(claim, second, node.config(claim, pod="uid-second")).refused(
        "vms/first", "uid-second", "a claim of its own"
    )
    assert "net0" not in second.links()
    assert first.links() == before
    node.hook(claim, first).ok()


@pytest.mark.parametrize(
    "annotations",
    [
        {},
        {"io.kubernetes.cri.sandbox-uid": ""},
        {"io.kubernetes.cri.sandbox-uid": "uid-vm", "io.kubernetes.pod.uid": "uid-other"},
        {"io.kubernetes.cri.sandbox-uid": "uid-other", "io.kubernetes.pod.uid": "uid-vm"},
        {"io.kubernetes.cri.sandbox-uid": ["uid-vm"]},
    ],
)
def test_a_container_whose_pod_is_not_proven_to_be_the_claims(
    node: Node, lab: Lab, annotations: dict[str, Any]
) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod, node.config(claim, annotations=annotations)).refused("the container's pod has UID")
    assert "net0" not in pod.links()


def test_cri_os_annotation(node: Node, lab: Lab) -> None:
    claim = node.prepare()
    node.hook(claim, lab.pod(), node.config(claim, annotations={"io.kubernetes.pod.uid": "uid-vm"})).ok()


def test_a_device_of_another_link_fails_the_container(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    config = node.config(claim)
    [device] = config["linux"]["devices"]
    for wrong in ({"minor": device["minor"] + 1}, {"major": device["major"] + 1}, {"minor": None}):
        changed = config | {"linux": config["linux"] | {"devices": [device | wrong]}}
        node.hook(claim, pod, changed).refused()
    other = [device, {"path": "/dev/null", "major": 1, "minor": 3}]
    node.hook(claim, pod, config | {"linux": config["linux"] | {"devices": other}}).ok()


def test_a_container_that_was_created_before_its_metadata_fails(node: Node, lab: Lab) -> None:
    """Its mount has the file that was there then."""
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    metadata = Metadata(str(node.agent.run))
    [path, _] = metadata.write(claim, {"metadata": {}}, {})[0]
    node.hook(claim, pod).refused("former device metadata", "create the container again")
    [request] = json.loads(Path(path).read_text())["requests"]
    assert request["devices"][0]["networkData"]["interfaceName"] == "net0"
    node.hook(claim, pod).ok()


def test_in_the_hosts_network_namespace_nothing_is_attached(node: Node) -> None:
    claim = node.prepare()
    before = node.lab.node.links()
    node.hook(claim, None).refused("own network namespace")
    assert node.lab.node.links().keys() == before.keys()


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"linux": 7}',
        b'{"linux": {"namespaces": [7]}}',
        b"[" * 100_000,
        bytes(1 << 20),
    ],
    ids=["empty", "no linux", "list", "null", "number", "namespace", "deep", "zeros"],
)
def test_a_config_json_that_cannot_be_read(node: Node, lab: Lab, config: bytes) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod, config or b" ").refused("config.json")
    node.hook(claim, pod).ok()


def test_a_config_json_that_is_too_large(node: Node, lab: Lab) -> None:
    claim = node.prepare()
    node.hook(claim, lab.pod(), bytes((1 << 20) + 1)).refused("config.json", "cannot be read")


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"{}",
        b'{"pid": 1}',
        b'{"bundle": "/"}',
        b'{"pid": 0, "bundle": "/"}',
        b'{"pid": -1, "bundle": "/"}',
        b'{"pid": 99999999999999999999, "bundle": "BUNDLE"}',
        b'{"pid": 1, "bundle": "/nowhere"}',
        b'{"pid": 1, "bundle": "\\u002f"}',
        b'{"pid": 1, "bundle": "' + b"x" * 5000 + b'"}',
        b'{"annotations": {"pid": 1, "bundle": "/"}}',
        b'"pid": 1, "bundle": "/"',
    ],
)
def test_a_state_that_cannot_be_read(node: Node, state: bytes) -> None:
    claim = node.prepare()
    node.shim(claim.uid, state).refused()
    assert node.record(claim) is None


def test_the_state_is_read_at_its_outermost_level(node: Node, lab: Lab, tmp_path: Path) -> None:
    """A pod's author chooses annotations, which may look like the state's own members."""
    pod, claim = lab.pod(), node.prepare()
    (tmp_path / "config.json").write_text(json.dumps(node.config(claim)))
    hostile = {"pid": 1, "bundle": "/", 'x"pid":1,"bundle":"/nowhere': "}]", "\\": '{"pid":1'}
    with in_pod(pod) as pid:
        state = {"annotations": hostile, "hooks": [{"pid": 1}], "pid": pid, "bundle": str(tmp_path)}
        node.shim(claim.uid, json.dumps(state).encode()).ok()


@pytest.mark.parametrize("uid", ["", "../x", "a/b", "x" * 100, "no-claim"])
def test_an_uid_that_is_none(node: Node, lab: Lab, uid: str) -> None:
    with in_pod(lab.pod()) as pid:
        (node.folder / "config.json").write_text(json.dumps(node.config(node.prepare())))
        state = json.dumps({"pid": pid, "bundle": str(node.folder)}).encode()
        node.shim(uid, state).refused()


def test_with_dra_off_the_container_fails(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.agent.end()
    node.agent.flags = ()
    node.agent.start()
    node.hook(claim, pod).refused("dra is off")


def test_a_refusal_names_the_claim_and_the_request(node: Node, lab: Lab) -> None:
    claim = node.prepare("vm", "data", mtu=60_000)
    node.hook(claim, lab.pod()).refused("vms/vm-nic", "request data", "mtu")
    assert node.record(claim) is None
    assert node.reserved(claim)


def test_two_containers_at_once(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare("vm", "data", "backup")
    (node.folder / "config.json").write_text(json.dumps(node.config(claim)))
    with in_pod(pod) as pid:
        state = json.dumps({"pid": pid, "bundle": str(node.folder)}).encode()
        env = {"VMTAP_RUN": str(node.agent.run)}
        hooks = [
            subprocess.Popen(
                [node.hook_path, claim.uid], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=env
            )
            for _ in range(8)
        ]
        for each in hooks:
            assert each.stdin
            each.stdin.write(state)
            each.stdin.close()
        for each in hooks:
            assert each.stderr
            with each:
                assert each.stderr.read() == b""
            assert each.returncode == 0
    until(lambda: node.link(claim, pod) == node.device(claim), "the node is not the link's")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim with the address and undefined behaviour sanitizers in it, under the hook's name."""
    made = tmp_path_factory.mktemp("shim") / "vmtap-hook"
    flags = [
        "-std=c11",
        "-g",
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-Wall",
        "-Werror",
    ]
    subprocess.run(["gcc", *flags, "-o", made, SOURCE], check=True)
    return made


piece = st.one_of(
    st.sampled_from(
        ["{", "}", "[", "]", ":", ",", '"', "\\", '"pid":', '"bundle":"', "1", "/", '{"pid":1,"bundle":"']
    ),
    st.text(max_size=5),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(piece, max_size=30), uid=st.text(st.characters(codec="utf-8", exclude_characters="\0"))
)
def test_any_state_under_the_sanitizers(sanitized: Path, tmp_path: Path, pieces: list[str], uid: str) -> None:
    env = {"VMTAP_RUN": str(tmp_path), "VMTAP_WAIT": "0"}
    state = "".join(pieces).encode(errors="replace")
    done = subprocess.run([sanitized, uid], input=state, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b""), done.stderr.decode()
    assert done.stderr.startswith(b"vmtap: ")


@pytest.mark.parametrize("there", [True, False])
def test_valgrind_finds_nothing(node: Node, lab: Lab, tmp_path: Path, there: bool) -> None:
    made = tmp_path / "valgrind/vmtap-hook"
    made.parent.mkdir()
    subprocess.run(["gcc", "-std=c11", "-g", "-O1", "-o", made, SOURCE], check=True)
    valgrind = shutil.which("valgrind")
    assert valgrind, "valgrind is not installed: lab/setup test"
    node.hook_path.unlink()
    node.hook_path.symlink_to(made)
    prefix = (valgrind, "-q", "--error-exitcode=99", "--leak-check=full", "--track-fds=yes")
    claim = node.prepare()
    if not there:
        node.agent.end()
    env = {"PATH": os.environ["PATH"], "VMTAP_WAIT": "60" if there else "0"}
    done = node.hook(claim, lab.pod(), None, prefix=prefix, **env)
    assert done.status == (0 if there else 1), done.stderr
