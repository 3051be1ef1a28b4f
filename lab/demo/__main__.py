"""One run of the demo, from the lab's first namespace to the exit status.

Two pods, each attached to every network of deploy/examples; a guest in each, with a NIC for each network; one table of
who reached whom. The exit status is 0 only if every result is the expected one, CHECK succeeded and nothing is left.
Must not know how the plugin works: it runs cnitool and vmtap-launch.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import itertools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab.assets.cache import CHECKOUT
from lab.cnitool import Cnitool
from lab.demo.cases import GUESTS, IFNAMES, Attachment, Outcome, other_guest
from lab.demo.ending import Ending
from lab.demo.reach import measure
from lab.demo.show import Show
from lab.guest import Guest, Image, Nic
from lab.process import LabError
from lab.wire import Lab

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lab.wire import Netns

EXAMPLES = CHECKOUT / "deploy/examples"


def demo(show: Show, ending: Ending) -> Outcome:
    """Runs the demo, and removes all that it made before it returns or raises.

    Raises LabError if something of the lab fails, and KeyboardInterrupt before a step after a signal.
    """
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        with show.step("a host, a switch and a peer machine, made of network namespaces"):
            lab = stack.enter_context(Lab())
            pods = {name: lab.pod(name) for name in GUESTS}
            netconf, policy = EXAMPLES / "net.d", EXAMPLES / "interfaces.yaml"
            cnitool = stack.enter_context(Cnitool(lab.node, netconf=netconf, policy=policy))
            before = _promiscuity(lab.node)
        with show.step(f"cnitool add: two pods, {len(IFNAMES)} networks each"):
            attachments = {name: _attach(cnitool, pods[name]) for name in GUESTS}
            _peer_is_gateway(lab.peer, attachments["a"].values())
        show.attachments(attachments)
        with show.step("vmtap-launch: two guests boot on the open fds, in software emulation"):
            image = stack.enter_context(Image())
            guests = {}
            for name, attached in attachments.items():
                nics = [Nic(one.mac, str(one.address)) for one in attached.values()]
                guests[name] = stack.enter_context(Guest(image, pods[name].path, nics, env=cnitool.env))
                ending.include(guests[name])
            for guest in guests.values():
                guest.ready()
            _introduce(guests, attachments)
        rows = measure(lab, guests, attachments, show)
        show.table(rows)
        made = list(itertools.product(pods.values(), IFNAMES.items()))
        with show.step("cnitool check") as wrong:
            wrong.extend(filter(None, (_check(cnitool, pod, *attachment) for pod, attachment in made)))
        with show.step("the guests power off"):
            for guest in guests.values():
                guest.power_off()
        with show.step("cnitool del"):
            for pod, (network, ifname) in made:
                cnitool("del", network, pod.path, ifname)
        left = cnitool.left()
        left += [
            f"{link} in pod {name}" for name, pod in pods.items() for link in pod.links() if link != "lo"
        ]
        if (after := _promiscuity(lab.node)) != before:
            left.append(f"on the host, links and their promiscuity: {after}, before: {before}")
    places = [place.path for place in (lab.node, lab.switch, lab.peer, *pods.values())]
    left += [str(path) for path in places if path.exists()]
    return Outcome(rows, wrong, left, time.monotonic() - start)


def _promiscuity(node: Netns) -> dict[str, int]:
    return {name: link["promiscuity"] for name, link in node.links().items()}


def _attach(cnitool: Cnitool, pod: Netns) -> dict[str, Attachment]:
    """Attaches the pod to every network: network → what the ADD returned."""
    attached = {}
    for network, ifname in IFNAMES.items():
        result = cnitool.add(network, pod.path, ifname)
        ip = result["ips"][0]
        address = ipaddress.IPv4Interface(ip["address"])
        attached[network] = Attachment(result["interfaces"][0]["mac"], address, ip["gateway"])
    return attached


def _peer_is_gateway(peer: Netns, attached: Iterable[Attachment]) -> None:
    """Gives the peer its address on each network, and makes it answer pings to a broadcast address."""

    def answer_broadcasts() -> None:
        Path("/proc/sys/net/ipv4/icmp_echo_ignore_broadcasts").write_text("0")

    peer.call(answer_broadcasts)
    peer.ip(*(f"address add {one.gateway}/{one.address.network.prefixlen} dev eth0" for one in attached))


def _introduce(guests: Mapping[str, Guest], attachments: Mapping[str, Mapping[str, Attachment]]) -> None:
    """Gives each guest static neighbour entries for the other: ARP fails where broadcasts do not pass."""
    for name, guest in guests.items():
        guest.must(
            "; ".join(f"arp -s {one.address.ip} {one.mac}" for one in attachments[other_guest(name)].values())
        )


def _check(cnitool: Cnitool, pod: Netns, network: str, ifname: str) -> str:
    """The error of `cnitool check` for one attachment, or "" if it succeeds."""
    checked = cnitool("check", network, pod.path, ifname, check=False)
    return f"{network}: {checked.stderr.strip()}" if checked.returncode else ""


def main() -> int:
    """Returns the exit status: 0 if every result is the expected one, 1 if not, 130 after a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.demo", description="Virtual machines talk over macvtap."
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    options = parser.parse_args()
    ending = Ending()
    show = Show(ending, quiet=options.json)
    show.head()
    try:
        outcome = demo(show, ending)
        ending.check()
    except (LabError, KeyboardInterrupt) as error:
        if not ending.signalled:
            print(f"lab.demo: {error}", file=sys.stderr)
            return 1
        print("lab.demo: interrupted; what it had made is gone", file=sys.stderr)
        return 130
    show.outcome(outcome)
    if options.json:
        print(json.dumps(outcome.document(), indent=2, ensure_ascii=False))
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
