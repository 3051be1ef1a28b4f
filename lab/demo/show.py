"""What the demo prints while it runs, and its table."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lab.demo.cases import IFNAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lab.demo.cases import Attachment, Case, Outcome, Seen
    from lab.demo.ending import Ending

COLUMNS = {
    "guest_unicast": "a ↔ b\nunicast",
    "guest_broadcast": "a ↔ b\nbroadcast",
    "peer_unicast": "↔ peer\nunicast",
    "peer_broadcast": "↔ peer\nbroadcast",
}
"""The heads of the table's columns, by the field of Reach."""


class Show:
    """The output for a person: nothing if quiet, plain text where stdout is no terminal."""

    PICTURE = """\
 guest a  guest b    QEMU, on the open fds of its pod's macvtaps and taps
     └──┬───┘
      eth1           the host's NIC; the taps' bridge has another one
        │
      switch         a reflective relay (802.1Qbg), or a plain switch
        │
      peer           another machine on the wire"""
    LEGEND = """\
expected / observed, inside both guests. Unicast: ping; from guest to guest with
static neighbour entries, as ARP is broadcast. Broadcast: a ping to the broadcast
address, which each that receives it answers."""

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
        """Prints a line when a step is done, and shows a spinner while it runs; yields a list for its errors.

        Raises KeyboardInterrupt before the step if a signal has arrived.
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
        """Prints the addresses and MACs of both guests, one line for each network."""
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
        """Prints the last lines: what is left, and whether every result is the expected one."""
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
    """expected / observed; the name of one guest if only that guest got through."""
    wanted = "yes" if expected else "no"
    through = "".join(guest for guest in reached if reached[guest])
    observed = {"": "no", "".join(reached): "yes"}.get(through, through)
    if observed != wanted:
        return Text.assemble((f"{wanted} ", "dim"), (f"✗ {observed}", "bold red"))
    return Text.assemble((f"{wanted} / ", "dim"), (observed, "green" if expected else "default"))
