"""A real QEMU moves from node to node by libvirt: pinged from beside the source, beside the target, and the wire."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from lab.libvirt import Daemon, Domain, Nic
from lab.process import PATIENCE
from lab.wire import NIC, Netns
from tests.kubevirt.conftest import DEPLOY, LauncherPod, image  # noqa: F401 - a fixture
from tests.waiting import until

if TYPE_CHECKING:
    from lab.guest import Image
    from tests.migration.conftest import Bed, Node

pytestmark = pytest.mark.vm

GUEST = "10.77.0.5"
NETWORK: dict[str, Any] = {"mode": "bridge"}
PINGS = 10


def neighbour(bed: Bed, node: Node, address: str) -> Netns:
    """A pod on the node's NIC with a network stack of its own: to a macvtap, a macvlan is a neighbour like another."""
    pod = bed.stack.enter_context(Netns("neighbour", ipv6=False))
    node.netns.ip(f"link add link {NIC} name net1 netns {pod.path} type macvlan mode bridge")
    pod.ip("link set net1 up", f"address add {address}/24 dev net1")
    pod.wait_until_up("net1")
    return pod


def lost(pinging: Netns) -> int:
    """How many of some pings get no answer, each of which may take long."""
    done = pinging.run(
        ["busybox", "ping", "-c", str(PINGS), "-W", "60", GUEST], check=False, timeout=PATIENCE * 3
    )
    return _lost(done.stdout)


def _lost(output: str) -> int:
    found = re.search(r"(\d+) packets transmitted, (\d+) packets received", output)
    assert found, output
    return int(found[1]) - int(found[2])


def test_a_live_migration(bed: Bed, image: Image) -> None:  # noqa: F811
    """Nobody loses a ping while the VM is copied, and after it has moved."""
    shutil.copyfile(DEPLOY / "examples/interfaces.yaml", bed.folder / "interfaces.yaml")
    everybody = {
        "beside the source": neighbour(bed, bed.a, "10.77.0.21"),
        "beside the target": neighbour(bed, bed.b, "10.77.0.22"),
        "on the wire": bed.lab.peer,
    }

    def losses() -> dict[str, int]:
        return {where: lost(pinging) for where, pinging in everybody.items()}

    def mode(pod: LauncherPod) -> str:
        found: str = pod.link("red")["linkinfo"]["info_data"]["mode"]
        return found

    source = LauncherPod(bed.a.agent.shim(), bed.lab.pod("source"), suffix="x7k2p")
    target = LauncherPod(bed.b.agent.shim(), bed.lab.pod("target"), suffix="9qwz4")
    source.add("red", deviceID="dataplaneMvp3", **NETWORK)
    target.add("red", deviceID="dataplaneMvp41", **NETWORK)
    with (
        Daemon(source.netns, [source.node("red")]) as here,
        Daemon(target.netns, [target.node("red")]) as there,
        Domain(here, image, [Nic("red", f"{GUEST}/24")]) as guest,
    ):
        guest.ready()

        def elsewhere() -> bool:
            """The guest asks for an address that nobody has: a broadcast, which the target's agent hears."""
            guest.run("ping -c 1 -W 1 10.77.0.99")
            return any((bed.b.agent.run / "elsewhere").glob("*")) and mode(target) == "vepa"

        until(elsewhere, "the target's agent has not heard that the VM runs elsewhere")
        assert mode(source) == "bridge"
        assert losses() == dict.fromkeys(everybody, 0)

        pings = {
            where: pinging.popen(["busybox", "ping", "-i", "0.2", GUEST], stdout=subprocess.PIPE, text=True)
            for where, pinging in everybody.items()
        }
        guest.migrate(there)
        until(
            lambda: (mode(source), mode(target)),
            "the move was not noticed",
            lambda now: now == ("vepa", "bridge"),
        )
        for ping in pings.values():
            ping.send_signal(signal.SIGINT)
        during = {where: _lost(ping.communicate(timeout=PATIENCE)[0]) for where, ping in pings.items()}
        print("pings lost while it moved:", during)
        assert losses() == dict.fromkeys(everybody, 0)
