"""A link waits for its guest: what ends the wait, what begins it again, and what is left when the pod ends."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from cni.state.store import Store
from lab.frames import mac_bytes
from tests.migration.conftest import VM, around, arp, copied_to, none_lost, rarp, runs_on
from tests.runner import BIN, Plugin, config
from tests.waiting import until, watched

if TYPE_CHECKING:
    from tests.migration.conftest import Attached, Bed

FORGED = 2000
MANY = 50
SILENT = "02:00:00:00:00:90"
OTHERS_ARP = bytes.fromhex("ffffffffffff") + mac_bytes("02:00:00:00:00:99") + arp(VM)[12:]


def test_a_guest_that_is_silent_from_its_start(bed: Bed) -> None:
    """Presumed: a neighbour reaches it. One whose MAC is heard from the wire is not, though it was made before."""
    beside = bed.b.neighbour()
    _, running = runs_on(bed.a)
    target = copied_to(bed.b, running)
    silent = bed.b.attach(SILENT)
    bed.guest(silent)
    until(lambda: silent.mode, "the silent guest is not presumed", lambda mode: mode == "bridge")
    assert target.mode == "vepa"
    assert bed.b.links()["waiting"] == 1
    assert beside.lost(SILENT) == beside.lost(VM) == 0


def test_a_presumed_guest_is_heard_from_the_wire(bed: Bed) -> None:
    """Its target's link was made long before the VM was started on the source."""
    silent = bed.b.attach()
    until(lambda: silent.mode, "the silent guest is not presumed", lambda mode: mode == "bridge")
    source, running = runs_on(bed.a)

    def heard() -> tuple[str, bool]:
        running.send(arp(VM))
        return silent.mode, silent.elsewhere

    until(heard, "the presumed link does not wait", lambda seen: seen == ("vepa", True))
    assert source.mode == "bridge"
    none_lost([bed.b.neighbour(), bed.machine])


def test_a_forged_announcement(bed: Bed) -> None:
    everybody = around(bed)
    source, running = runs_on(bed.a)

    def forged() -> str:
        bed.wire.send(rarp(VM))
        return source.mode

    until(forged, "the link does not wait", lambda mode: mode == "vepa")

    def speaks() -> str:
        running.send(arp(VM))
        return source.mode

    until(speaks, "the guest's frame does not end the wait", lambda mode: mode == "bridge")
    none_lost(everybody)


@pytest.mark.parametrize("speaks", [False, True])
def test_a_flood_of_forged_announcements(bed: Bed, speaks: bool) -> None:
    """Changes are limited to one return a second, whatever is sent, and ADD is answered."""
    source, running = runs_on(bed.a)
    before, began = bed.a.changes(), time.monotonic()
    for number in range(FORGED):
        bed.wire.send(rarp(VM))
        if speaks and number % 20 == 0:
            running.send(arp(VM))
    bed.a.attach(SILENT)
    changes, seconds = bed.a.changes() - before, time.monotonic() - began
    # A return and its end for each second that has begun, and the end of the new link's wait.
    assert changes <= 2 * (seconds + 2) + 1

    everybody = around(bed)  # not from before: the flood would fill their queues

    def lost() -> list[int]:
        running.send(arp(VM))
        return [each.lost(seconds=1.0) for each in everybody]

    # Again: an announcement in the second after a guest's frame takes effect at the end of it.
    until(lost, "the guest's frames do not end the wait", lambda seen: seen == [0, 0, 0])
    assert source.mode == "bridge"


def test_frames_that_announce_nothing(bed: Bed) -> None:
    """Not an ordinary ARP request of the guest's MAC, nor an announcement of another MAC."""
    source, _ = runs_on(bed.a)
    marker, marked = runs_on(bed.a, SILENT)
    for frame in (arp(VM), OTHERS_ARP):
        bed.wire.send(frame)

    def after() -> str:
        bed.wire.send(rarp(SILENT))
        return marker.mode

    until(after, "the marker's link does not wait", lambda mode: mode == "vepa")
    assert source.mode == "bridge"
    marked.stop()


def test_a_gratuitous_arp_packet_announces(bed: Bed) -> None:
    source, _ = runs_on(bed.a)

    def announced() -> str:
        bed.wire.send(arp(VM, announcement=True))
        return source.mode

    until(announced, "the link does not wait", lambda mode: mode == "vepa")


def test_vepa_and_pepa_stay(bed: Bed) -> None:
    """A link in bridge mode that gets the frames after them shows that the agent has had its time."""
    modes = {"02:00:00:00:00:a0": "vepa", "02:00:00:00:00:a1": "pepa"}
    made = [bed.a.attach(mac, mode=mode) for mac, mode in modes.items()]
    assert not any(each.record.handover for each in made)
    before = [each.mode for each in made]
    assert before == ["vepa", "private"]
    for mac, each in zip(modes, made, strict=True):
        bed.guest(each, rarp(mac))
    marker, _ = runs_on(bed.a)
    assert [each.mode for each in made] == before

    def announced() -> str:
        for mac in (*modes, VM):
            bed.wire.send(rarp(mac))
        return marker.mode

    until(announced, "the marker's link does not wait", lambda mode: mode == "vepa")
    assert [each.mode for each in made] == before
    assert sum(bed.a.links().values()) == 1


def test_a_one_shot_makes_the_mode_that_was_requested(bed: Bed) -> None:
    plugin = Plugin(node=bed.lab.node, state=bed.folder / "state", policy=bed.folder / "none.yaml")
    pod = bed.lab.pod()
    plugin("ADD", config(source="eth1", mode="bridge"), netns=pod).ok()
    assert pod.links()["net1"]["linkinfo"]["info_data"]["mode"] == "bridge"
    (id,) = Store(plugin.state).recorded()
    record = Store(plugin.state).load(id)
    assert record
    assert not record.handover
    plugin("DEL", config(source="eth1", mode="bridge"), netns=pod).ok()


def test_del_while_the_link_waits(bed: Bed) -> None:
    everybody = around(bed)
    others = len(bed.b.kept())
    _, running = runs_on(bed.a)
    target = copied_to(bed.b, running)
    assert len(bed.b.kept()) > others
    target.delete()
    assert len(bed.b.kept()) == others
    until(lambda: bed.b.links()["waiting"], "the agent still watches the link", lambda count: count == 0)
    running.send(arp(VM))
    assert len(bed.b.kept()) == others
    again = copied_to(bed.b, running)
    none_lost(everybody)
    again.delete()
    assert len(bed.b.kept()) == others


def test_the_mac_is_announced_after_del(bed: Bed) -> None:
    """Nothing is left in the state folder, whether or not the agent has noticed that the link is gone."""
    source, running = runs_on(bed.a)
    running.stop()
    source.delete()
    source.close()
    source.pod.close()
    other, _ = runs_on(bed.a, SILENT)

    def announced() -> str:
        for mac in (VM, SILENT):
            bed.wire.send(rarp(mac))
        return other.mode

    until(announced, "the agent does not hear", lambda mode: mode == "vepa")
    other.delete()
    assert bed.a.kept() == []


def test_a_pod_that_ends_without_del(bed: Bed) -> None:
    """The agent's sockets do not keep its network namespace: the other end of its veth goes with it."""
    _, running = runs_on(bed.a)
    target = copied_to(bed.b, running)
    bed.b.netns.ip(f"link add canary type veth peer name canary netns {target.pod.path}")
    target.close()
    target.pod.close()
    until(bed.b.netns.links, "the namespace is kept alive", lambda links: "canary" not in links)
    until(bed.b.links, "the agent still watches the link", lambda links: not any(links.values()))


def test_an_agent_that_may_hear_nothing(bed: Bed) -> None:
    bed.a.agent.end()
    bed.a.agent.prefix = ("setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-net_raw")
    bed.a.agent.start()
    why = bed.a.agent.said(
        "without CAP_NET_RAW no guest can be heard: VMs that migrate are lost to neighbours meanwhile"
    )
    assert why["level"] == "warning"
    made = bed.a.attach()
    assert (made.mode, made.record.handover) == ("bridge", False)
    made.delete()


def test_a_device_that_cannot_be_listened_on(bed: Bed) -> None:
    """Guests on another device are watched all the same, and the log has a line a second of it."""
    memory = "net.core.optmem_max"
    usual = bed.a.netns.run(["sysctl", "-n", memory]).stdout.strip()  # of each namespace since Linux 6.7
    bed.lab.switch.plug("second", bed.a.netns, "eth3", 1500)
    bed.lab.switch.wait_until_up("second")
    bed.a.netns.wait_until_up("eth3")
    bed.a.netns.run(["sysctl", "-qw", f"{memory}=600"])  # room for the filter of a few MACs
    many = [bed.a.attach(f"02:00:00:00:02:{number:02x}") for number in range(MANY)]
    began = time.monotonic()
    other = bed.a.attach(source="eth3")

    def announced() -> str:
        bed.wire.send(rarp(VM))
        return other.mode

    until(lambda: other.mode, "the silent guest is not presumed", lambda mode: mode == "bridge")
    until(announced, "the other device is not heard", lambda mode: mode == "vepa")
    for _ in range(FORGED):
        bed.wire.send(rarp(VM))
    bed.a.netns.run(["sysctl", "-qw", f"{memory}={usual}"])

    def heard() -> str:
        bed.wire.send(rarp("02:00:00:00:02:00"))
        return many[0].mode

    until(lambda: bed.a.links()["waiting"], "the many are not presumed", lambda waiting: waiting <= 1)
    until(heard, "it is not tried again", lambda mode: mode == "vepa")
    seconds = time.monotonic() - began
    bed.a.agent.end()
    failed = [line for line in bed.a.agent.log if line["msg"].startswith("watching guests failed")]
    assert 1 <= len(failed) <= 2 * (seconds + 1), "of two steps"
    assert {line["error"] for line in failed} == {"Cannot allocate memory"}


def test_no_table_is_left_in_a_pod_that_lives_on(bed: Bed) -> None:
    """As after the hot-unplug of one interface of several."""
    made = bed.a.attach()

    def tables() -> list[str]:
        return made.pod.run(["nft", "list", "tables"]).stdout.splitlines()

    until(tables, "its frames are not noted", lambda found: found == ["table netdev vmtap-net1"])
    made.delete()
    until(tables, "the table stays", lambda found: found == [])


def test_many_at_once(bed: Bed) -> None:
    """Every second guest speaks; all end in bridge mode, and nothing is left of them."""

    def attach(number: int) -> Attached:
        made = bed.a.attach(mac := f"02:00:00:00:02:{number:02x}")
        if number % 2:
            os.write(made.fd, bytes(10) + arp(mac))
        return made

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(attach, range(MANY)))
    links = until(bed.a.links, "a guest is waited for without end", lambda links: links["waiting"] == 0)
    assert links["here"] + links["presumed"] == MANY
    assert links["presumed"] >= MANY / 2
    assert {each.mode for each in made} == {"bridge"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: each.delete(), made))
    assert bed.a.kept() == []
    until(bed.a.links, "the agent still watches links", lambda links: not any(links.values()))


def test_vmtapctl_shows_who_waits(bed: Bed) -> None:
    """list and show name it, and watch prints the change when the guest is heard."""
    _, running = runs_on(bed.b)
    made = copied_to(bed.a, running)  # it would not wait for long if its VM were nowhere
    command = [BIN / "vmtapctl"]
    where = ["--json", "--run", str(bed.a.agent.run)]
    (listed,) = json.loads(bed.a.netns.run([*command, "list", *where]).stdout)["attachments"]
    assert (listed["mode"], listed["waiting"]) == ("bridge", True)
    assert "bridge (waiting)" in bed.a.netns.run([*command, "list", *where[1:]]).stdout
    assert "until its guest is heard" in bed.a.netns.run([*command, "show", "net1", *where[1:]]).stdout
    with (
        bed.a.netns.popen([*command, "watch", *where], stdout=subprocess.PIPE, text=True) as watch,
        watched(watch),
    ):
        assert watch.stdout
        (before,) = [json.loads(watch.stdout.readline())]
        bed.guest(made, rarp(VM))
        after = json.loads(watch.stdout.readline())
        watch.terminate()
    assert (before["event"], before["attachment"]["waiting"]) == ("present", True)
    assert (after["event"], after["was"], after["attachment"]["waiting"]) == (
        "changed",
        "in use, waiting for its guest",
        False,
    )
