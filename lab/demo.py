"""The demo: virtual machines talk over macvtap and tap in every mode, and every cell of the table is measured.

    python -m lab.demo [--json]      (make demo, make demo A=--json)

Two pods, each attached to every network of deploy/examples; a guest in each, with a NIC for each network; one
table of who reached whom. The exit status is 0 only if all is as expected, CHECK agreed and nothing is left. Must
not know how the plugin does it: it talks to cnitool and to vmtap-launch.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import itertools
import json
import re
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lab.cnitool import Cnitool
from lab.guest import Guest, Image, Nic
from lab.process import LabError
from lab.wire import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lab.wire import Netns

EXAMPLES = Path(__file__).resolve().parent.parent / "deploy/examples"
PING = "ping -c 3 -W 3"
"""One answer to three requests, up to three seconds after the last, is enough: the machine may be busy."""
_TRIES = 3
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GUESTS = ("a", "b")
COLUMNS = {
    "guest_unicast": "a ↔ b\nunicast",
    "guest_broadcast": "a ↔ b\nbroadcast",
    "peer_unicast": "↔ peer\nunicast",
    "peer_broadcast": "↔ peer\nbroadcast",
}
"""Of the table, by the field of Reach."""


@dataclass(frozen=True)
class Reach:
    """Who reaches whom: guest ↔ guest and guest ↔ peer machine, by unicast and by broadcast."""

    guest_unicast: bool
    guest_broadcast: bool
    peer_unicast: bool = True
    peer_broadcast: bool = True


@dataclass(frozen=True)
class Case:
    """A row of the table; reflecting: what the switch does at the NIC that macvtaps are on."""

    device: str
    mode: str
    reflecting: bool
    expected: Reach

    @property
    def network(self) -> str:
        return f"{self.device}-{self.mode}"


CASES = (
    Case("macvtap", "vepa", False, Reach(guest_unicast=False, guest_broadcast=False)),
    Case("macvtap", "vepa", True, Reach(guest_unicast=True, guest_broadcast=True)),
    Case("macvtap", "pepa", False, Reach(guest_unicast=False, guest_broadcast=False)),
    # Of what the switch reflects, Linux' private mode drops broadcasts and multicasts only.
    Case("macvtap", "pepa", True, Reach(guest_unicast=True, guest_broadcast=False)),
    Case("macvtap", "bridge", False, Reach(guest_unicast=True, guest_broadcast=True)),
    Case("macvtap", "bridge", True, Reach(guest_unicast=True, guest_broadcast=True)),
    Case("tap", "bridge", False, Reach(guest_unicast=True, guest_broadcast=True)),
    Case("tap", "pepa", False, Reach(guest_unicast=False, guest_broadcast=False)),
)
IFNAMES = {
    network: f"net{n}" for n, network in enumerate(dict.fromkeys(case.network for case in CASES), start=1)
}
"""In the pods, by network."""

Seen = dict[str, dict[str, bool]]
"""What was measured: a field of Reach → guest → did it reach the other?"""


def as_expected(case: Case, seen: Seen) -> bool:
    """Did each guest reach just those that the case says?"""
    return all(reached == getattr(case.expected, kind) for kind in seen for reached in seen[kind].values())


@dataclass(frozen=True)
class Outcome:
    """What the demo has shown."""

    rows: Sequence[tuple[Case, Seen]]
    check_errors: Sequence[str]
    left: Sequence[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return (
            [case for case, _ in self.rows] == list(CASES)
            and all(as_expected(case, seen) for case, seen in self.rows)
            and not self.check_errors
            and not self.left
        )

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "ok": self.ok,
            "rows": [
                {
                    "device": case.device,
                    "mode": case.mode,
                    "reflecting": case.reflecting,
                    "ok": as_expected(case, seen),
                    **{
                        kind: {"expected": getattr(case.expected, kind), "observed": reached}
                        for kind, reached in seen.items()
                    },
                }
                for case, seen in self.rows
            ],
            "checkErrors": list(self.check_errors),
            "left": list(self.left),
            "seconds": round(self.seconds, 1),
        }


class Ending:
    """Ctrl-C and the like: noted, and the guests are killed, so that who waits for one is told that it has ended.

    Nothing is raised in the midst of what runs: that could be the making of a thing that nobody has a note of yet.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._guests: list[Guest] = []
        for number in ENDING:
            signal.signal(number, self._end)

    def check(self) -> None:
        """Raises KeyboardInterrupt if the end is wanted."""
        if self.wanted:
            raise KeyboardInterrupt

    def ends(self, guest: Guest) -> None:
        """This guest too; it may not outlive an end that is wanted already, so: check()."""
        self._guests.append(guest)
        self.check()

    def _end(self, *_: object) -> None:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        self.wanted = True
        for guest in self._guests:
            guest.process.kill()


class Show:
    """What the person who watches sees; nothing if a program reads. Plain text where there is no terminal."""

    PICTURE = """\
 guest a  guest b    QEMU, on the open fds of its pod's macvtaps and taps
     └──┬───┘
      eth1           the host's NIC; the taps' bridge has another one
        │
      switch         may reflect a frame to where it came from (802.1Qbg)
        │
      peer           another machine on the wire"""
    LEGEND = """\
expected / observed, inside both guests. Unicast: ping; from guest to guest with
static neighbour entries, as ARP is broadcast. Broadcast: a ping to all, and who
answers it."""

    def __init__(self, ending: Ending, *, quiet: bool) -> None:
        self._ending = ending
        self._console = Console(quiet=quiet, highlight=False, emoji=False, soft_wrap=True)
        self._terminal = self._console.is_terminal
        if not self._terminal:
            self._console.width = 100

    def head(self) -> None:
        title = "vmtap: virtual machines on the wire"
        if self._terminal:
            self._console.print(
                Panel(self.PICTURE, title=title, expand=False, border_style="dim", padding=(0, 1))
            )
        else:
            self._console.print(f"{title}\n\n{self.PICTURE}\n")

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[list[str]]:
        """A line for a step when it is done, a spinner while it runs; yields a list for what was wrong.

        Raises KeyboardInterrupt before the step if the end is wanted.
        """
        self._ending.check()
        start = time.monotonic()
        wrong: list[str] = []
        with self._console.status(f"{text} …"):
            yield wrong
        self._line("✗" if wrong else "✓", "red" if wrong else "green", text, time.monotonic() - start)
        for line in wrong:
            self._console.print(f"  {escape(line)}", style="red")

    def attachments(self, attachments: Mapping[str, Mapping[str, Attachment]]) -> None:
        """What each guest was given, a line a network."""
        for network in IFNAMES:
            both = (
                f"{name} {given[network].address.ip} {given[network].mac}"
                for name, given in attachments.items()
            )
            self._console.print(f"  {network:14}  {'  '.join(both)}", style="dim")

    def table(self, rows: Sequence[tuple[Case, Seen]]) -> None:
        table = Table(
            box=box.ROUNDED if self._terminal else box.ASCII, header_style="bold", border_style="dim"
        )
        for head in ("device", "mode", "switch", *COLUMNS.values()):
            table.add_column(head, no_wrap=True)
        networks = [case.network for case, _ in rows]
        for (case, seen), following in zip(rows, [*networks[1:], None], strict=True):
            cells = [_cell(getattr(case.expected, kind), seen[kind]) for kind in COLUMNS]
            switch = "reflects" if case.reflecting else "plain"
            table.add_row(case.device, case.mode, switch, *cells, end_section=case.network != following)
        self._console.print()
        self._console.print(table)
        self._console.print(f"{self.LEGEND}\n", style="dim")

    def outcome(self, outcome: Outcome) -> None:
        """The last lines: what is left, and whether all was well."""
        for thing in outcome.left:
            self._line("✗", "red", f"left behind: {thing}")
        if not outcome.left:
            self._line(
                "✓", "green", "nothing is left: links, namespaces, state and leases; promiscuity as before"
            )
        if outcome.ok:
            self._line("✓", "bold green", "all as expected", outcome.seconds)
        else:
            self._line("✗", "bold red", "not as expected", outcome.seconds)

    def _line(self, sign: str, style: str, text: str, seconds: float | None = None) -> None:
        time_taken = "" if seconds is None else f"[dim]{seconds:>6.1f} s[/]"
        self._console.print(f"[{style}]{sign}[/] {escape(text):68}{time_taken}")


def _cell(expected: bool, reached: Mapping[str, bool]) -> Text:
    """expected / observed; the name of one guest if only that one got through."""
    wanted = "yes" if expected else "no"
    through = "".join(guest for guest in reached if reached[guest])
    observed = {"": "no", "".join(reached): "yes"}.get(through, through)
    if observed != wanted:
        return Text.assemble((f"{wanted} ", "dim"), (f"✗ {observed}", "bold red"))
    return Text.assemble((f"{wanted} / ", "dim"), (observed, "green" if expected else "default"))


@dataclass(frozen=True)
class Attachment:
    """What an ADD gave a guest."""

    mac: str
    address: ipaddress.IPv4Interface
    gateway: str


def demo(show: Show, ending: Ending) -> Outcome:
    """All of it; what it made is gone when it returns or raises.

    Raises LabError, GuestError, AssetError, and KeyboardInterrupt before a step if the end is wanted.
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
                ending.ends(guests[name])
            for guest in guests.values():
                guest.ready()
            _introduce(guests, attachments)
        rows = _rows(lab, guests, attachments, show)
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
    """Adds every network to the pod."""
    attached = {}
    for network, ifname in IFNAMES.items():
        result = cnitool.add(network, pod.path, ifname)
        ip = result["ips"][0]
        address = ipaddress.IPv4Interface(ip["address"])
        attached[network] = Attachment(result["interfaces"][0]["mac"], address, ip["gateway"])
    return attached


def _peer_is_gateway(peer: Netns, attached: Iterable[Attachment]) -> None:
    """Gives the peer its address on each network; it answers when all are pinged."""

    def answer_broadcasts() -> None:
        Path("/proc/sys/net/ipv4/icmp_echo_ignore_broadcasts").write_text("0")

    peer.call(answer_broadcasts)
    peer.ip(*(f"address add {one.gateway}/{one.address.network.prefixlen} dev eth0" for one in attached))


def _introduce(guests: Mapping[str, Guest], attachments: Mapping[str, Mapping[str, Attachment]]) -> None:
    """Static neighbour entries for the other guest: where broadcasts do not pass, ARP would not."""
    for name, guest in guests.items():
        guest.must(
            "; ".join(f"arp -s {one.address.ip} {one.mac}" for one in attachments[_other(name)].values())
        )


def _other(name: str) -> str:
    return GUESTS[1 - GUESTS.index(name)]


def _rows(
    lab: Lab,
    guests: Mapping[str, Guest],
    attachments: Mapping[str, Mapping[str, Attachment]],
    show: Show,
) -> list[tuple[Case, Seen]]:
    """Every case, measured: first those of a plain switch, then those of a reflecting one."""
    seen: dict[tuple[str, bool], Seen] = {}
    for reflecting in (False, True):
        lab.switch.reflect(reflecting)
        networks = [case.network for case in CASES if case.reflecting == reflecting]
        with show.step(
            f"who reaches whom while the switch {'reflects' if reflecting else 'does not reflect'}"
        ):
            asked = {network: _ask(network, guests, attachments) for network in networks}
            for network, answers in asked.items():
                seen[network, reflecting] = answers()
            for case in CASES:
                if case.reflecting == reflecting:
                    _ask_again(case, seen[case.network, reflecting], guests, attachments)
    return [(case, seen[case.network, case.reflecting]) for case in CASES]


def _ask_again(
    case: Case,
    seen: Seen,
    guests: Mapping[str, Guest],
    attachments: Mapping[str, Mapping[str, Attachment]],
) -> None:
    """Adds who answers only now of those that should: a guest may have had no processor for seconds."""
    for _ in range(_TRIES):
        if all(not getattr(case.expected, kind) or all(reached.values()) for kind, reached in seen.items()):
            return
        for kind, reached in _ask(case.network, guests, attachments)().items():
            seen[kind] = {name: seen[kind][name] or there for name, there in reached.items()}


def _ask(
    network: str, guests: Mapping[str, Guest], attachments: Mapping[str, Mapping[str, Attachment]]
) -> Callable[[], Seen]:
    """Lets both guests ping on one network, and goes on; call what it returns for what was reached."""
    pings = {}
    for name, guest in guests.items():
        other, own = (attachments[who][network] for who in (_other(name), name))
        addresses = {"guest": str(other.address.ip), "peer": own.gateway}
        replies = {who: guest.ask(f"{PING} {address}") for who, address in addresses.items()}
        everybody = guest.ask(f"{PING} {own.address.network.broadcast_address}")
        pings[name] = (addresses, replies, everybody)

    def answers() -> Seen:
        seen: Seen = {field.name: {} for field in fields(Reach)}
        for name, (addresses, replies, everybody) in pings.items():
            answered = set(re.findall(r"bytes from ([\d.]+)", everybody().output))
            for who, address in addresses.items():
                seen[f"{who}_unicast"][name] = replies[who]().status == 0
                seen[f"{who}_broadcast"][name] = address in answered
        return seen

    return answers


def _check(cnitool: Cnitool, pod: Netns, network: str, ifname: str) -> str:
    """What cnitool check has to complain about; "" if nothing."""
    checked = cnitool("check", network, pod.path, ifname, check=False)
    return f"{network}: {checked.stderr.strip()}" if checked.returncode else ""


def main() -> int:
    """0 if all was as expected, 1 if not or if something failed, 130 if interrupted."""
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
        if not ending.wanted:
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
