"""list, show and tree on real attachments: what they say is what the kernel says, and they change nothing."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cni.kernel import netns, tapdev
from cni.state import lock
from cni.state.record import boot_id
from cni.state.store import in_netns
from tests.ctl.conftest import Ctl, announced, lldp_frame
from tests.waiting import until

if TYPE_CHECKING:
    from lab.wire import Lab, Netns

KEYS = {
    "id", "network", "containerID", "ifname", "netns", "pod", "vm", "status", "device", "mode", "waiting",
    "interface", "source", "virtualFunction", "vlan", "mac", "mtu", "queues", "addresses", "ifindex", "deviceNumber",
    "deviceNode", "since", "holders", "toGuest", "fromGuest", "port", "claim",
}  # fmt: skip
"""docs/vmtapctl.md lists them: taking one away breaks somebody's script."""


def test_nothing_is_attached(ctl: Ctl) -> None:
    assert "nothing is attached" in ctl("list").stdout
    assert ctl.json("list")["attachments"] == []
    assert "nothing is attached" in ctl("tree").stdout


def test_a_vm_is_found_by_what_it_holds(ctl: Ctl, pod: Netns, lab: Lab) -> None:
    mac = ctl.add(pod, name="virt-launcher-web-x7b2d")
    ctl.add(pod, ifname="net2", name="virt-launcher-web-x7b2d", source="br0", mode="bridge", queues=2)
    other = lab.pod("other")
    ctl.add(other, container="c2", ifname="net2", device="tap", queues=2)  # of the same name
    with ctl.vm(pod, "web1") as pid:
        first, second, third = ctl.json("list")["attachments"]
        assert first.keys() == KEYS
        held = {(each["containerID"], each["ifname"]): each for each in (first, second, third)}
        web = held["c1", "net1"]
        assert (web["status"], web["vm"], web["mac"]) == ("in use", "web1", mac)
        assert web["pod"] == {"namespace": "shop", "name": "virt-launcher-web-x7b2d", "uid": "u"}
        [holder] = web["holders"]
        assert holder == {
            "pid": pid, "uid": 107, "program": "qemu-system-x86_64", "vm": "web1", "queues": 1, "broker": False,
        }  # fmt: skip
        assert [each["queues"] for each in held["c1", "net2"]["holders"]] == [2]
        assert held["c2", "net2"]["status"] == "idle"
        text = ctl("list").stdout
        assert f"qemu-system-x86_64 {pid}" in text
        assert "\x1b" not in text
        assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert {each["status"] for each in ctl.json("list")["attachments"]} == {"idle"}


def test_an_fd_of_a_link_that_is_gone_holds_nothing(ctl: Ctl, pod: Netns) -> None:
    """The kernel gives its device number to the next macvtap, and the old fd still shows it."""
    ctl.add(pod)
    namespace = netns.open_path(str(pod.path))
    [record] = in_netns(ctl.plugin.state, netns.identity(namespace))
    [fd] = tapdev.open_queues(namespace, record, 1)
    holder = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
    os.close(fd)
    os.close(namespace)
    try:
        [before] = ctl.json("list")["attachments"]
        assert [each["pid"] for each in before["holders"]] == [holder.pid]
        ctl.delete(pod)
        ctl.add(pod)
        [after] = ctl.json("list")["attachments"]
        assert (after["status"], after["holders"]) == ("idle", [])
    finally:
        holder.kill()
        holder.wait()


def test_who_was_given_fds_by_the_agent_and_has_closed_them(ctl: Ctl, pod: Netns) -> None:
    ctl.add(pod)
    [each] = ctl.json("list")["attachments"]
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    noted = ctl.plugin.state / "holders" / each["id"]
    noted.parent.mkdir(exist_ok=True)
    noted.write_text(f'["{boot_id()}", [[{os.getpid()}, {start}], [{os.getpid()}1, 1]]]')
    [each] = ctl.json("list")["attachments"]
    assert [(holder["pid"], holder["queues"], holder["broker"]) for holder in each["holders"]] == [
        (os.getpid(), 0, True)
    ]
    assert each["status"] == "idle"


def test_status_follows_the_kernel(ctl: Ctl, lab: Lab, pod: Netns) -> None:
    def status() -> str:
        [each] = ctl.json("list")["attachments"]
        return str(each["status"])

    ctl.add(pod)
    assert status() == "idle"
    lab.switch.ip("link set node down")
    until(lambda: status() == "no carrier", "the kernel has not handed on the loss of the carrier")
    pod.ip("link set net1 down")
    assert status() == "down"
    pod.ip("link delete net1")
    assert status() == "gone"


def test_looking_changes_nothing(ctl: Ctl, pod: Netns) -> None:
    ctl.add(pod)
    folder = ctl.plugin.state / "attachments"
    (folder / "c9-000000000000000000000000.json").write_text("{")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    for words in (["list"], ["tree"], ["show", "net1"], ["doctor"]):
        ctl(*words, status=None)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    [(path, _)] = ctl.json("list")["unreadable"].items()
    assert path.endswith("c9-000000000000000000000000.json")


@pytest.mark.parametrize(
    "what", ["net1", "shop/virt-launcher-web-x7b2d", "virt-launcher-web-x7b2d", "web", "MAC", "c1c1"]
)
def test_show_takes_what_people_have_at_hand(ctl: Ctl, pod: Netns, what: str) -> None:
    mac = ctl.add(pod, container="c1c1c1c1", name="virt-launcher-web-x7b2d")
    shown = ctl("show", mac if what == "MAC" else what).stdout
    assert mac in shown
    assert "from guest" in shown


def test_show_what_is_not_there(ctl: Ctl, pod: Netns) -> None:
    ctl.add(pod, name="web")
    done = ctl("show", "net7", status=os.EX_NOINPUT)
    assert (done.stdout, done.stderr) == (
        "", "vmtapctl: no attachment is named or belongs to 'net7'; attached are shop/web\n",
    )  # fmt: skip


def test_traffic_is_told_from_the_guests_side(ctl: Ctl, lab: Lab, pod: Netns) -> None:
    ctl.add(pod, device="tap")
    before = ctl.json("show", "net1")["attachments"][0]
    lab.node.run(["nsenter", f"--net={pod.path}", "ip", "link", "set", "net1", "up"])
    namespace = netns.open_path(str(pod.path))
    [record] = in_netns(ctl.plugin.state, netns.identity(namespace))
    [fd] = tapdev.open_queues(namespace, record, 1)
    os.write(fd, bytes(10) + bytes.fromhex("ffffffffffff020000000001 88b5") + bytes(46))
    os.close(fd)
    os.close(namespace)
    after = ctl.json("show", "net1")["attachments"][0]
    assert after["fromGuest"]["packets"] == before["fromGuest"]["packets"] + 1


def test_tree(ctl: Ctl, pod: Netns, lab: Lab) -> None:
    ctl.plugin.policy.write_text(
        "interfaces: [{name: data, source: {dev: eth1}, capacity: 9}, {name: old, source: {dev: eth7}}]\n"
        "allowUnlisted: true\n"
    )
    ctl.add(pod, name="virt-launcher-web-x7b2d", interface="data", mode="bridge")
    ctl.add(pod, ifname="net2", source="br0", mode="bridge")
    ctl.add(pod, ifname="tap0", device="tap")
    with ctl.vm(pod, "web1", "--ifname", "net1") as pid:
        lines = [line.strip("│├└─ \xa0") for line in ctl("tree").stdout.splitlines()]
    assert lines[1].startswith("eth1  up  veth  10 Gb/s  mtu 1500  [data 1 of 9]")
    assert lines[2].startswith("net1  macvtap bridge  ")
    assert lines[3:5] == [
        "pod shop/virt-launcher-web-x7b2d",
        f"VM web1  qemu-system-x86_64  pid {pid}  uid 107  1 queue",
    ]
    assert "eth7  missing  [old]" in lines
    assert any(line.startswith("br0  up  bridge  10 Gb/s  mtu 1500  over eth2") for line in lines)
    assert lines[-3].startswith("no source")
    document = ctl.json("tree")
    assert [(source["name"], source["state"], source["nics"]) for source in document["sources"]] == [
        ("eth1", "up", ["eth1"]),
        ("eth7", "missing", []),
        ("br0", "up", ["eth2"]),
    ]
    assert document.keys() == {"node", "time", "sources", "attachments", "unreadable"}


def test_the_switch_says_who_it_is(ctl: Ctl, pod: Netns, lab: Lab) -> None:
    ctl.add(pod)
    with announced(lab, lldp_frame(port=b"\x05Eth1/7\x1b[2J")):
        document = ctl.json("tree", "--lldp", "30")
    assert document["sources"][0]["switch"] == [{"system": "leaf-12", "port": "Eth1/7\\u001b[2J"}]


def test_picture(ctl: Ctl, pod: Netns, tmp_path: Path) -> None:
    mac = ctl.add(pod, name="<web>&co")
    with ctl.vm(pod, "web1") as pid:
        ctl("tree", "--svg", tmp_path / "node.svg")
        assert ctl("tree", "--svg", "-").stdout.startswith("<svg ")
    root = ET.parse(tmp_path / "node.svg").getroot()  # noqa: S314 - ours
    words = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"eth1", "net1", "<web>&co", "web1", f"qemu-system-x86_64 {pid}"} <= set(words)
    assert f"in use · macvtap bridge · {mac}" in words
    assert not [element for element in root.iter() if element.tag.endswith(("script", "image"))]


def test_without_privilege_the_next_step_is_said(ctl: Ctl, pod: Netns) -> None:
    ctl.add(pod)
    os.chown(ctl.plugin.state, 1234, 1234)
    less = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    done = subprocess.run(
        [*less, *ctl.argv("list")], env=ctl.env(), capture_output=True, text=True, check=False
    )
    os.chown(ctl.plugin.state, 0, 0)
    assert done.returncode == os.EX_IOERR
    assert "run vmtapctl as root" in done.stderr


def test_what_an_add_is_at_work_on(ctl: Ctl, pod: Netns) -> None:
    ctl.add(pod)
    [each] = ctl.json("list")["attachments"]
    pod.ip("link set net1 down")
    with lock.held(str(ctl.plugin.state / "lock"), each["id"]):
        assert ctl.json("list")["attachments"][0]["status"] == "in progress"
        pod.ip("link delete net1")
        assert ctl.json("list")["attachments"][0]["status"] == "in progress"
    assert ctl.json("list")["attachments"][0]["status"] == "gone"
