"""Every system call of an ADD that changes something, refused once: an error that says so, and nothing is left.

Found in a traced run and then made to fail, one run for each, with what a full or broken node would say.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cni import spec
from lab.wire import BRIDGE, NIC
from tests.fakeipam import FakeIpam
from tests.faults.inject import CHANGES, Point, points
from tests.runner import config

if TYPE_CHECKING:
    from collections.abc import Callable

    from lab.wire import Lab, Netns
    from tests.faults.baseline import Baseline
    from tests.faults.inject import Injector
    from tests.runner import Answer, Plugin

IPAM = FakeIpam.config
CASES: dict[str, dict[str, Any]] = {
    "macvtap": {"source": NIC, "owner": 107, "ipam": IPAM},
    "tap on a bridge": {"source": BRIDGE, "device": "tap", "ipam": IPAM, "addressing": "link"},
}
CODES = {value for name, value in vars(spec).items() if name.isupper() and isinstance(value, int)}
ERRNO = {"sendto": "ENOBUFS", "vfork": "EAGAIN", "setns": "EPERM", "mknodat": "EPERM", "fsmount": "EPERM"}
"""What a call fails with where it is not a file's; files see a broken disk."""


def refuse(step: Point, errno: str, *, from_then_on: bool = False) -> list[str]:
    when = f"{step.nth}{'+' if from_then_on else ''}"
    return ["-e", f"trace={step.call}", "-e", f"inject={step.call}:error={errno}:when={when}"]


@pytest.mark.parametrize("case", CASES)
def test_each_step_is_refused_once(
    *, injector: Injector, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, case: str
) -> None:
    conf = config(**CASES[case])
    handle("ADD", conf, netns=pod).ok()  # makes the folders of state
    handle("DEL", conf, netns=pod).ok()
    _, trace = injector("ADD", conf, "-e", f"trace={CHANGES}", netns=pod)
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()
    for step in points(trace):
        answer, seen = injector("ADD", conf, *refuse(step, ERRNO.get(step.call, "EIO")), netns=pod)
        try:
            assert "INJECTED" in seen
            if answer.status == 0:  # a retry, or something that ADD can do without
                assert answer.document["interfaces"]
                handle("DEL", conf, netns=pod).ok()
            elif not step.text.startswith("1, "):  # stdout itself
                assert answer.document["code"] in CODES - {spec.INTERNAL}, answer
                if step.call == "sendto":
                    assert answer.document["code"] == spec.TRY_AGAIN_LATER, answer
            baseline.holds()
        except AssertionError as error:
            error.add_note(f"refused at {step}")
            raise


@pytest.mark.parametrize("errno", ["ENOSPC", "EROFS", "EIO"])
def test_the_state_cannot_be_written(
    *,
    injector: Injector,
    handle: Callable[..., Answer],
    pod: Netns,
    plugin: Plugin,
    baseline: Baseline,
    errno: str,
) -> None:
    conf = config(source=NIC)
    handle("ADD", conf, netns=pod).ok()  # makes the folders of state
    handle("DEL", conf, netns=pod).ok()
    _, trace = injector("ADD", conf, "-e", f"trace={CHANGES}", netns=pod)
    handle("DEL", conf, netns=pod).ok()
    steps = [step for step in points(trace) if str(plugin.state) in step.text or "network" in step.text]
    assert {step.call for step in steps} >= {"openat", "symlink", "write", "rename"}
    for step in steps:
        answer, _ = injector("ADD", conf, *refuse(step, errno), netns=pod)
        assert answer.error(spec.IO_FAILURE)["msg"], step
        baseline.holds()


@pytest.mark.parametrize("errno", ["ENOSPC", "EROFS", "EIO"])
def test_the_state_folder_cannot_be_made(
    *, injector: Injector, pod: Netns, baseline: Baseline, errno: str
) -> None:
    answer, _ = injector("ADD", config(source=NIC), "-e", f"inject=mkdir:error={errno}", netns=pod)
    assert "state" in answer.error(spec.IO_FAILURE)["msg"]
    baseline.holds()


def test_a_read_only_state_does_not_keep_a_link(
    *,
    injector: Injector,
    plugin: Plugin,
    handle: Callable[..., Answer],
    lab: Lab,
    pod: Netns,
    baseline: Baseline,
) -> None:
    conf = config(source=NIC)
    handle("ADD", conf, netns=pod).ok()
    options = ["-e", "inject=mkdir,unlink,rename,symlink:error=EROFS"]
    answer, _ = injector("DEL", conf, *options, netns=pod)
    answer.error(spec.IO_FAILURE)  # it may be repeated
    assert "net1" not in pod.links()
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize("first", [2, 3, 4])
def test_the_kernel_has_no_room(
    *, injector: Injector, handle: Callable[..., Answer], pod: Netns, baseline: Baseline, first: int
) -> None:
    """For good, from some message on, so that undoing fails as well: 11, and a DEL in better times ends it."""
    conf = config(source=NIC, ipam=IPAM)
    answer, _ = injector("ADD", conf, "-e", f"inject=sendto:error=ENOBUFS:when={first}+", netns=pod)
    answer.error(spec.TRY_AGAIN_LATER)
    handle("DEL", conf, netns=pod).ok()
    baseline.holds()


@pytest.mark.parametrize(
    "fault", ["torn", "foreign", "empty", "a list", "not text", "unreadable", "a folder"]
)
def test_a_damaged_record(
    *, injector: Injector, plugin: Plugin, handle: Callable[..., Answer], lab: Lab, fault: str, pod: Netns
) -> None:
    """DEL works from the namespace; others are not touched; GC goes on past it."""
    conf = config(source=NIC, owner=107)
    bystander = lab.pod()
    handle("ADD", conf, netns=bystander, container="c2").ok()
    others = set(plugin.leftovers())
    handle("ADD", conf, netns=pod).ok()
    (record,) = [path for path in (plugin.state / "attachments").iterdir() if path.name.startswith("c1-")]
    good = record.read_text()
    if fault == "a folder":
        record.unlink()
        record.mkdir()
    elif fault != "unreadable":
        foreign = next((plugin.state / "attachments").glob("c2-*")).read_text()
        content = {"torn": good[:100], "foreign": foreign, "empty": "", "a list": "[]", "not text": "\udcff{"}
        record.write_text(content[fault], errors="surrogateescape")
    if fault == "unreadable":
        answer, _ = injector("DEL", conf, "-e", "inject=read:error=EIO", "-P", str(record), netns=pod)
        answer.error(spec.IO_FAILURE)
        assert "net1" not in pod.links()
        handle("DEL", conf, netns=pod).ok()
    elif fault == "a folder":
        handle("DEL", conf, netns=pod).error(spec.IO_FAILURE)
        assert "net1" not in pod.links()
        record.rmdir()
        handle("DEL", conf, netns=pod).ok()
    else:
        handle("DEL", conf, netns=pod).ok()
        bad = record.with_suffix(".bad")
        assert bad.exists()  # for a person to look at
        bad.unlink()
    assert "net1" not in pod.links()
    assert set(plugin.leftovers()) == others
    assert "net1" in bystander.links()
    handle("CHECK", conf | {"prevResult": prev(handle, bystander)}, netns=bystander, container="c2").ok()
    handle("ADD", conf, netns=pod).ok()


def prev(handle: Callable[..., Answer], pod: Netns) -> dict[str, Any]:
    """A prevResult that says what ADD said."""
    return {
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "net1", "mac": pod.links()["net1"]["address"], "sandbox": str(pod.path), "mtu": 1500}
        ],
    }


@pytest.mark.parametrize("fault", ["torn", "a folder"])
def test_gc_goes_on_past_a_damaged_record(
    *, plugin: Plugin, handle: Callable[..., Answer], lab: Lab, fault: str
) -> None:
    conf = config(source=NIC, owner=107)
    pods = {container: lab.pod() for container in ("c1", "c2", "c3")}
    for container, pod in pods.items():
        handle("ADD", conf, netns=pod, container=container).ok()
    (record,) = (plugin.state / "attachments").glob("c1-*")
    if fault == "torn":
        record.write_text("{")
    else:
        record.unlink()
        record.mkdir()
    answer = handle("GC", conf | {"cni.dev/valid-attachments": []})
    assert (answer.status != 0) is (fault == "a folder")
    assert "net1" not in pods["c2"].links()
    assert "net1" not in pods["c3"].links()
    if fault == "a folder":
        record.rmdir()
    handle("DEL", conf, netns=pods["c1"]).ok()
    assert "net1" not in pods["c1"].links()
    for path in record.parent.glob("*.bad"):
        path.unlink()
    assert plugin.leftovers() == []


def test_state_from_before_a_reboot(
    *, plugin: Plugin, handle: Callable[..., Answer], lab: Lab, pod: Netns
) -> None:
    """The record speaks of an index and a device number that are another's now: that is left alone, the rest goes."""
    conf = config(source=NIC, owner=107)
    handle("ADD", conf, netns=pod).ok()
    (record,) = (plugin.state / "attachments").glob("*.json")
    document = json.loads(record.read_text())
    pod.ip("link del net1")
    other = lab.pod()
    lab.node.ip(
        f"link add link {NIC} name net1 index {document['ifindex']} netns {pod.path} type macvtap mode bridge"
    )
    record.write_text(json.dumps(document | {"boot_id": "00000000-0000-0000-0000-000000000000"}))
    handle("DEL", conf, netns=pod).ok()
    assert pod.links()["net1"]["ifindex"] == document["ifindex"]
    assert plugin.leftovers() == []
    handle("ADD", conf, netns=other).ok()  # and the index can be had again


@pytest.mark.parametrize("command", ["GC", "ADD"])
def test_state_from_before_a_reboot_goes_by(
    *, plugin: Plugin, handle: Callable[..., Answer], lab: Lab, pod: Netns, command: str
) -> None:
    conf = config(source=NIC, owner=107)
    handle("ADD", conf, netns=pod).ok()
    (record,) = (plugin.state / "attachments").glob("*.json")
    document = json.loads(record.read_text())
    record.write_text(json.dumps(document | {"boot_id": "00000000-0000-0000-0000-000000000000"}))
    pod.ip("link del net1")
    if command == "GC":
        handle("GC", conf | {"cni.dev/valid-attachments": []}).ok()
        assert plugin.leftovers() == []
    else:
        handle("ADD", conf, netns=pod).ok()
        assert len(plugin.leftovers()) == 3
