"""Claims and sandboxes: what NRI attaches and detaches, and what must never start with a wrong device or none."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni.agent.nri import nri_pb2 as api
from cni.state import cdi
from cni.state.minors import Given
from cni.state.record import boot_id
from tests.agent.claims.conftest import WIRE, in_pod, run, sandbox, stop
from tests.fakeipam import GATE, FakeIpam
from tests.runner import config
from tests.waiting import until

if TYPE_CHECKING:
    from lab.wire import Lab, Netns
    from tests.agent.claims.conftest import Node
    from tests.unit.agent.nri.runtime import Plugin, Runtime


_MINORS = 64


def test_a_sandboxs_life(node: Node, lab: Lab, plugin: Plugin) -> None:
    pod, claim = lab.pod(), node.prepare("vm", "data", "backup")
    assert run(plugin, pod) == ""
    assert {"net0", "net1"} <= pod.links().keys()
    record = node.record(claim)
    assert record
    assert (record.claim, record.netns, record.pod) == (True, str(pod.path), ("vms", "vm"))
    assert node.device(claim) == node.given(claim) == node.link(claim, pod)
    node.hook(claim, pod).ok()
    assert stop(plugin, pod) == ""
    assert node.given(claim) == (1, 3)
    assert not {"net0", "net1"} & pod.links().keys()
    assert node.record(claim) is None
    assert node.device(claim) is None
    assert node.reserved(claim)
    assert node.claims.load(claim.uid) == claim


def test_a_pod_without_claims(node: Node, lab: Lab, plugin: Plugin) -> None:
    pod = lab.pod()
    node.prepare("another")
    before = pod.links().keys()
    assert (run(plugin, pod), stop(plugin, pod)) == ("", "")
    assert pod.links().keys() == before


def test_claims_that_cannot_be_read_do_not_fail_other_pods(node: Node, lab: Lab, plugin: Plugin) -> None:
    pod, claim = lab.pod(), node.prepare()
    folder = node.agent.run / "claims"
    (folder / f"{claim.uid}.json").write_text("{")
    assert run(plugin, pod) == ""
    node.hook(claim, pod).refused("is not prepared")
    (folder / f"{claim.uid}.bad").unlink()
    folder.rmdir()
    folder.write_text("")
    assert run(plugin, pod) == ""


def test_a_refused_attach_fails_the_sandbox_with_the_reason(node: Node, lab: Lab, plugin: Plugin) -> None:
    node.policy(modes=["vepa"])
    pod, claim = lab.pod(), node.prepare()
    error = run(plugin, pod)
    assert "ResourceClaim vms/vm-nic, request nic" in error
    assert "eth1" in error
    assert "net0" not in pod.links()
    assert node.record(claim) is None
    assert node.reserved(claim)


def test_a_pod_in_the_hosts_network(node: Node, plugin: Plugin) -> None:
    claim = node.prepare()
    without = api.StateChangeEvent(
        event="RUN_POD_SANDBOX", pod=api.PodSandbox(id="s1", name="vm", uid="uid-vm", namespace="vms", pid=7)
    )
    assert "do not set hostNetwork" in plugin.call("StateChange", without).status.message
    assert "own network namespace" in run(plugin, node.lab.node)
    assert node.record(claim) is None


def test_a_remade_sandbox_gets_the_device_again(node: Node, lab: Lab, plugin: Plugin) -> None:
    first, second, claim = lab.pod(), lab.pod(), node.prepare()
    run(plugin, first)
    stop(plugin, first)
    run(plugin, second)
    assert second.links()["net0"]["ifindex"] == claim.devices[0].ifindex
    assert node.device(claim) == node.link(claim, second)
    node.start(claim, second)


def test_a_sandbox_that_is_remade_without_a_stop(node: Node, lab: Lab, plugin: Plugin) -> None:
    """The runtime was killed, or the event was lost; the link moves, and the first sandbox's late end takes nothing."""
    first, second, claim = lab.pod(), lab.pod(), node.prepare()
    run(plugin, first)
    assert run(plugin, second) == ""
    assert "net0" not in first.links()
    node.start(claim, second)
    before = second.links()
    assert stop(plugin, first) == ""
    assert second.links() == before
    assert node.device(claim) == node.link(claim, second)


def test_a_second_pod_with_the_claim_gets_nothing(node: Node, lab: Lab, plugin: Plugin) -> None:
    first, second, claim = lab.pod(), lab.pod(), node.prepare("first")
    run(plugin, first, "first")
    before = first.links()
    assert run(plugin, second, "second") == ""
    assert "net0" not in second.links()
    node.hook(claim, second, node.config(claim, pod="uid-second")).refused("vms/first")
    assert stop(plugin, second, "second") == ""
    assert first.links() == before
    node.hook(claim, first).ok()


def _device_of(pod: Netns, name: str) -> tuple[int, int]:
    """(major, minor) of a macvtap in the pod."""
    show = [
        "unshare",
        "-m",
        "sh",
        "-ec",
        f"mount -t sysfs none /sys; cat /sys/class/net/{name}/macvtap/*/dev",
    ]
    major, minor = pod.run(show).stdout.split(":")
    return int(major), int(minor)


def test_a_dead_driver_and_a_remade_sandbox_never_give_another_pods_device(node: Node, lab: Lab) -> None:
    """A device node that is left leads to another pod's macvtap, which has the minor of the first by now."""
    with_runtime = lab.pod(), lab.pod(), lab.pod()
    first, other, second = with_runtime
    claim = node.prepare()
    node.hook(claim, first).ok()
    left = node.device(claim)
    node.agent.end(signal.SIGKILL)
    # The sandbox ends, another pod gets the minor, and the sandbox is made again: nobody sees it.
    first.ip("link delete net0")
    first.close()
    assert left
    for number in range(
        _MINORS
    ):  # the kernel gives the lowest minor that is free, and other tests take some, too
        name = f"stolen{number}"
        lab.node.ip(f"link add link eth1 name {name} type macvtap mode bridge")
        lab.node.ip(f"link set {name} netns {other.path}")
        if _device_of(other, name) == left:
            break
    else:
        pytest.fail(f"no macvtap got the minor of {left}")
    assert node.device(claim) == left
    config = node.config(claim)
    node.hook(claim, second, config, VMTAP_WAIT="0").refused("vmtapd does not answer")
    assert "net0" not in second.links()

    node.agent.start()
    refused = node.hook(claim, second, config)
    link = node.link(claim, second)
    assert link == node.device(claim)
    assert link != left
    refused.refused(f"device {left[0]}:{left[1]}", "create the container again")
    assert node.given(claim) == link
    node.hook(claim, second).ok()  # with the node that there is now


def test_a_node_that_is_left_of_a_claim_ends_at_the_agents_start(node: Node, lab: Lab) -> None:
    claim = node.prepare()
    node.hook(claim, lab.pod()).ok()
    id = claim.attachment(claim.devices[0])
    node.agent.end(signal.SIGKILL)
    (node.agent.run / "attachments" / f"{id}.json").unlink()  # a DEL was killed before it removed the node
    lab.node.ip("link set eth1 down", "link delete eth1")  # and the link with its lower device
    assert node.device(claim)
    node.agent.start()
    until(lambda: node.device(claim) is None, "the node stays")
    assert node.reserved(claim)


def test_the_end_of_a_namespace_ends_the_attachment_and_not_the_claim(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    pod.close()
    until(lambda: node.record(claim) is None, "the record stays")
    until(lambda: node.device(claim) is None, "the node stays")
    assert node.reserved(claim)
    again = lab.pod()
    node.start(claim, again)
    assert again.links()["net0"]["ifindex"] == claim.devices[0].ifindex


def test_an_index_stays_reserved_until_the_claim_is_unprepared(node: Node, lab: Lab) -> None:
    claim = node.prepare()
    node.agent.end(signal.SIGKILL)
    node.agent.flags += ("--reconcile-seconds", "1", "--metrics", "127.0.0.1:0")
    node.agent.start()
    shim = node.agent.shim()
    other = lab.pod()
    for _ in range(3):  # full runs of the reconciler
        last = _last_run(node)
        until(lambda last=last: _last_run(node) != last, "the reconciler does not run")  # type: ignore[misc]
    name = claim.devices[0].network
    gc = {**WIRE, "name": name, "cni.dev/valid-attachments": []}
    assert shim("GC", config(**gc), env={"CNI_PATH": "/nowhere"}).ok() == {}
    assert node.reserved(claim)
    node.start(claim, other)
    assert shim("GC", config(**gc), env={"CNI_PATH": "/nowhere"}).ok() == {}
    node.claims.remove(claim.uid)  # set aside, say
    assert shim("GC", config(**gc), env={"CNI_PATH": "/nowhere"}).ok() == {}
    assert "net0" in other.links()
    assert node.record(claim)


def _last_run(node: Node) -> str:
    """When the reconciler's last full run has ended."""
    lines = node.agent.get("/metrics")[2].splitlines()
    return next(line for line in lines if line.startswith("vmtap_reconcile_last_run_timestamp_seconds"))


def test_an_adopted_link_is_the_claims(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    with in_pod(pod):
        node.hook(claim, pod).ok()
        id = claim.attachment(claim.devices[0])
        node.agent.end(signal.SIGKILL)
        (node.agent.run / "attachments" / f"{id}.json").unlink()
        node.agent.start()
        record = until(lambda: node.record(claim), "the link is not adopted")
        assert record
        assert (record.claim, record.pod) == (True, ("vms", "vm"))
        node.hook(claim, pod).ok()


def test_a_minor_stays_the_pods_until_it_has_ended(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    _, minor = node.link(claim, pod)
    given = node.store.minors.get(minor)
    id = claim.attachment(claim.devices[0])
    assert given == Given(id, boot_id(), "uid-vm")
    node.start(claim, lab.pod())  # the sandbox is made again: the pod may have its own minor
    record = node.record(claim)
    assert record
    assert record.claim


def test_synchronize_attaches_what_was_started_meanwhile(node: Node, lab: Lab, runtime: Runtime) -> None:
    dead, alive, sole, other = lab.pod(), lab.pod(), lab.pod(), lab.pod()
    claim, second = node.prepare("vm"), node.prepare("sole")
    gone = api.PodSandbox(
        id="s0",
        name="vm",
        uid="uid-vm",
        namespace="vms",
        linux=api.LinuxPodSandbox(namespaces=[api.LinuxNamespace(type="network", path="/run/netns/gone")]),
    )
    pods = [
        sandbox(alive, "vm"),
        sandbox(dead, "vm", pid=0),
        gone,
        sandbox(other, "other"),
        sandbox(sole, "sole", pid=0),
        api.PodSandbox(),
    ]
    with runtime.accept() as plugin:
        plugin.connected(pods)
        until(lambda: node.record(claim) and node.record(second), "the claims are not attached")
        until(lambda: "net0" in alive.links() and "net0" in sole.links(), "the links are not there")
        assert "net0" not in dead.links()
        assert "net0" not in other.links()
        node.hook(claim, alive).ok()
        before = alive.links()
    # The runtime restarts: nothing changes for a pod that is attached.
    with runtime.accept() as plugin:
        plugin.connected(pods)
        assert run(plugin, lab.pod(), "other") == ""
        node.hook(claim, alive).ok()
        assert alive.links() == before


def test_an_agent_that_restarts_leaves_attached_pods_alone(node: Node, lab: Lab, runtime: Runtime) -> None:
    pod, claim = lab.pod(), node.prepare()
    with in_pod(pod):
        with runtime.accept() as plugin:
            plugin.connected()
            run(plugin, pod)
        before, written = pod.links(), node.store.written_ns(claim.attachment(claim.devices[0]))
        node.agent.end(signal.SIGKILL)
        node.agent.start()
        with runtime.accept() as plugin:
            plugin.connected([sandbox(pod)])
            node.hook(claim, pod).ok()
            assert pod.links() == before
            assert node.store.written_ns(claim.attachment(claim.devices[0])) == written


def test_a_slow_attach_is_waited_for_by_the_hook(node: Node, lab: Lab, runtime: Runtime) -> None:
    """By default NRI waits two seconds; an IPAM plugin may take longer."""
    fake = FakeIpam(node.hook_path.parent)
    fake.write(ADD=GATE)
    os.mkfifo(fake.seen / "gate")
    pod, claim = lab.pod(), node.prepare("vm", ipam=FakeIpam.config)
    cdi.set_devices(str(node.folder / "cdi"), claim.uid, {f"/dev/tap{claim.devices[0].ifindex}": (240, 1)})
    with runtime.accept() as plugin:
        plugin.connected(wait=500)
        assert run(plugin, pod) == ""  # in time, and the attach goes on
        until(lambda: fake.commands() == ["ADD"], "the delegate does not run")
        assert node.given(claim) == (1, 3)  # and not the numbers of the link before
        assert "net0" not in pod.links()
        assert run(plugin, lab.pod(), "another") == ""
        (fake.seen / "gate").write_text("")
        node.hook(claim, pod).ok()
        assert fake.commands() == ["ADD"]
        assert node.device(claim) == node.link(claim, pod)
        assert fake.leases() == {f"{claim.uid}-net0"}
        assert stop(plugin, pod) == ""
        assert fake.leases() == set()
    assert fake.env("ADD")["CNI_ARGS"] == claim.devices[0].args


def test_the_pod_may_delete_the_link_and_start_again(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    node.hook(claim, pod).ok()
    old = node.config(claim)
    pod.ip("link delete net0")
    answer = node.hook(claim, pod, old)
    assert "net0" in pod.links()
    if answer.status:  # the new link has another minor
        answer.refused("create the container again")
    node.hook(claim, pod).ok()


def test_a_link_of_that_name_that_is_not_the_claims_fails_the_container(node: Node, lab: Lab) -> None:
    pod, claim = lab.pod(), node.prepare()
    pod.ip("link add net0 type bridge")
    node.hook(claim, pod).refused("net0", "already")
    assert node.record(claim) is None
    assert node.reserved(claim)


def test_a_cdi_file_that_cannot_be_written_keeps_no_link_alive(node: Node, lab: Lab, plugin: Plugin) -> None:
    pod, claim = lab.pod(), node.prepare()
    run(plugin, pod)
    folder = node.folder / "cdi"
    blocked = folder / f"vmtap-claim-{claim.uid}.json.new"
    blocked.mkdir()
    assert "CDI spec" in stop(plugin, pod)
    assert "net0" not in pod.links()
    assert node.record(claim) is None
    again = lab.pod()
    blocked.rmdir()
    node.start(claim, again)
    assert node.given(claim) == node.link(claim, again)


def test_the_device_node_is_made_whatever_the_umask(node: Node, lab: Lab) -> None:
    claim = node.prepare()
    node.hook(claim, lab.pod()).ok()
    mode = Path(node.store.node(claim.devices[0].ifindex)).stat().st_mode
    assert stat.S_IMODE(mode) == 0o660
