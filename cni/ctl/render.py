"""Output for people: tables and trees, with colour at a terminal, plain aligned lines elsewhere (and NO_COLOR).

Only what rich adds for colour and layout reaches the terminal as it is. Must not look anything up: it is given what to
show.
"""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cni.ctl.stream import terminal
from cni.names import escaped
from cni.state.probe_results import MEND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TextIO

    from rich.console import ConsoleOptions, RenderableType

    from cni.ctl.finding import Finding
    from cni.ctl.inventory import Attachment, Node, Source, Traffic
    from cni.ctl.probe import Probe
    from cni.kernel.lldp import Evb
    from cni.state.port_profile import Port

STATUS = {
    "in use": "green",
    "idle": "cyan",
    "in progress": "blue",
    "no carrier": "yellow",
    "down": "yellow",
    "gone": "red",
    "old": "red",
}
SOURCE = {"up": "green", "no carrier": "yellow", "down": "yellow", "missing": "red"}
REFLECTS = {
    True: ("reflects", "green"),
    False: ("does not reflect", "yellow"),
    None: ("unknown", "red"),
}
_MEANS = {
    True: "guests in vepa mode on this node reach each other",
    False: "guests in vepa mode on this node do not reach each other",
    None: "it is unknown whether guests in vepa mode on this node reach each other",
}
SEVERITY = {"ok": ("✔", "green"), "warning": ("▲", "yellow"), "error": ("✘", "red")}
_WIDE = ("NETWORK", "MTU", "QUEUES", "SINCE", "ID")
_LEAST = ("HELD BY", "CLAIM", "ADDRESS", "SOURCE", "DEVICE")
"""Columns that are left out in a narrow terminal, in this order."""
_UNWRAPPED = 100_000


class _Console(Console):
    """Escapes what is unprintable in a text that it prints."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(escaped(text, kept="\n"), style)


def console(file: TextIO | None = None) -> Console:
    """A console for stdout. Where that is no terminal, lines are not wrapped, so that they can be searched."""
    made = _Console(file=file or terminal(sys.stdout), highlight=False, emoji=False, markup=False)
    if not made.is_terminal:
        made.width = _UNWRAPPED
    return made


def say(shown: RenderableType) -> None:
    """Print on stdout, without the blanks at the end of a table's lines."""
    out = console()
    with out.capture() as captured:
        out.print(shown)
    terminal(sys.stdout).write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def attachments(found: Sequence[Attachment], out: Console, *, wide: bool) -> RenderableType:
    """A table with a line for each attachment. A narrow terminal gets fewer columns, unless wide."""
    if not found:
        return Text("nothing is attached on this node", style="dim")
    rows = [_row(each, terminal=out.is_terminal) for each in found]
    columns = [title for title in rows[0] if wide or title not in _WIDE]
    if not any(each.claim for each in found):
        columns.remove("CLAIM")
    for title in () if wide else _LEAST:
        room = sum(max(len(title), *(len(row[title]) for row in rows)) + 2 for title in columns)
        if room <= out.width:
            break
        if title in columns:
            columns.remove(title)
    table = _table(out.is_terminal)
    for title in columns:
        table.add_column(title, no_wrap=title != "POD", overflow="fold")
    for row in rows:
        table.add_row(*(row[title] for title in columns))
    return table


def _row(each: Attachment, *, terminal: bool) -> dict[str, Text]:
    record = each.record
    return {
        "POD": Text(each.sandbox),
        "IFNAME": Text(record.ifname),
        "DEVICE": Text(" ".join(filter(None, (record.device, each.mode)))),
        "SOURCE": Text(" ".join(filter(None, (record.source, each.function))) or "-"),
        "MAC": Text(record.mac),
        "ADDRESS": Text(" ".join(each.addresses) or "-"),
        "STATUS": _status(each, terminal),
        "CLAIM": Text(each.claimed or "-"),
        "HELD BY": Text(", ".join(f"{holder.program} {holder.pid}" for holder in each.holders) or "-"),
        "NETWORK": Text(record.network),
        "MTU": Text(str(record.mtu)),
        "QUEUES": Text(str(record.queues)),
        "SINCE": Text(_since(each)),
        "ID": Text(record.id),
    }


def details(each: Attachment) -> RenderableType:
    """All details of one attachment."""
    record, pod = each.record, each.pod
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        if value not in (None, "", ()):
            grid.add_row(name, value if isinstance(value, Text) else str(value))

    row("status", _status(each, terminal=True))
    row("pod", f"{pod.namespace}/{pod.name}" if pod else None)
    row("resource claim", each.claimed)
    row("container", record.container_id)
    row("network", record.network)
    row("device", " ".join(filter(None, (record.device, each.mode))))
    if each.waiting:
        row(
            "waiting", "in vepa mode until its guest is heard: neighbours on this node reach the VM elsewhere"
        )
    row("source", _named(record.source, record.interface))
    row("virtual function", f"{each.function}, {record.vf.pci}" if record.vf else None)
    row("VLAN", each.vlan)
    row("port", profile(record.port))
    row("MAC", record.mac)
    row("addresses", " ".join(each.addresses))
    row("MTU", record.mtu)
    row("queues", record.queues)
    for holder in each.holders:
        vm = f', VM "{holder.vm}"' if holder.vm else ""
        given = ", by the agent" if holder.broker else ""
        queues = count(holder.queues, "queue")
        row("held by", f"{holder.program}, pid {holder.pid}, uid {holder.uid}, {queues}{given}{vm}")
    row("to guest", _traffic(each.to_guest))
    row("from guest", _traffic(each.from_guest))
    row("netns", f"{record.netns} (net:[{record.netns_id[1]}], nsid {record.nsid})")
    row("ifindex", record.ifindex)
    row("char device", "{}:{}".format(*each.device) if each.device else None)
    row("device node", record.node)
    row("since", _since(each))
    row("id", record.id)
    title = Text.assemble((record.ifname, "bold"), " of ", (each.sandbox, "bold"))
    return Group(title, Padding(grid, (0, 0, 0, 2)))


def profile(port: Port | None) -> str:
    """The profile as "macSpoofCheck, trunk 100 200-210, rate.out 1 Gbit/s"."""
    words = []
    for name, value in (port.fields() if port else {}).items():
        if name == "rate":
            words += [f"rate.{way} {_bits(value[way])}" for way in ("out", "in") if way in value]
        elif isinstance(value, bool):
            words.append(name if value else f"{name} off")
        elif isinstance(value, list):
            words.append(f"{name} {' '.join(value) or 'none'}")
        else:
            words.append(f"{name} {value}/s")
    return ", ".join(words)


def _bits(rate: int) -> str:
    for unit, size in (("Gbit/s", 10**9), ("Mbit/s", 10**6), ("kbit/s", 10**3)):
        if rate >= size:
            return f"{rate / size:g} {unit}"
    return f"{rate} bit/s"


def tree(node: Node) -> RenderableType:
    """Switch port → NIC → attachment → pod → process."""
    root = Tree(Text.assemble("node ", (node.name, "bold")), guide_style="dim")
    for source in node.sources:
        parent = root
        if source.neighbours:
            ports = ", ".join(f"{each.system} port {each.port}" for each in source.neighbours)
            parent = root.add(Text.assemble("switch ", (ports, "bold")))
        branch = parent.add(_source(node, source))
        found = node.on(source.name)
        for number, taken in _by_function(found).items():
            _add(_function(branch, source, number) if number is not None else branch, taken)
    if plain := node.on(None):
        _add(root.add(Text("no source: plain taps", style="dim")), plain)
    if len(node.sources) == 0 and not plain:
        root.add(Text("nothing is attached, and the policy names nothing", style="dim"))
    return root


def _by_function(found: Iterable[Attachment]) -> dict[int | None, list[Attachment]]:
    """The attachments by the number of their VF; None: those without a VF."""
    sorted_out: dict[int | None, list[Attachment]] = {}
    for each in found:
        sorted_out.setdefault(each.record.vf.number if each.record.vf else None, []).append(each)
    return dict(sorted(sorted_out.items(), key=lambda item: -1 if item[0] is None else item[0]))


def _function(branch: Tree, source: Source, number: int) -> Tree:
    known = next((each for each in source.functions if each.number == number), None)
    name = Text.assemble((f"VF {number}", "bold"))
    if known is None:
        name.append("  gone", style="red")
    else:
        name.append("".join(f"  {fact}" for fact in (known.link, known.pci) if fact))
    return branch.add(name)


def findings(found: Iterable[Finding], *, terminal: bool) -> RenderableType:
    """A list of findings, each with its next step below it."""
    grid = Table.grid(padding=(0, 1))
    for _ in range(3):
        grid.add_column(overflow="fold")
    grid.columns[1].no_wrap = True
    for each in found:
        sign, style = SEVERITY[each.severity]
        message = Text(escaped(each.message))
        if each.next_step:
            message.append(f"\n→ {each.next_step}", style="bold" if terminal else "")
        grid.add_row(
            Text(sign if terminal else each.severity, style=style), Text(each.check, style="dim"), message
        )
    return grid


def probe(made: Probe) -> RenderableType:
    """The result of a probe: what frames and LLDP show of the switch behind a source."""
    found = made.found
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("seen", found.why)
    grid.add_row("so", _MEANS[found.reflects])
    for nic, neighbour in made.neighbours.items():
        grid.add_row("switch", f"{neighbour.system} port {neighbour.port}, at {nic}")
        grid.add_row("EVB", _evb(made.evb.get(nic)))
    if made.seconds and not made.neighbours:
        grid.add_row("LLDP", f"no frame was received in {made.seconds:g} s")
    if found.reflects is False:
        grid.add_row("→", Text(MEND, style="bold"))
    word, style = REFLECTS[found.reflects]
    return Group(Text.assemble((found.source, "bold"), "  ", (word, style)), Padding(grid, (0, 0, 0, 2)))


def _evb(evb: Evb | None) -> str:
    if evb is None:
        return "the switch sent no EVB TLV"
    can = "on" if evb.on else "possible, off" if evb.capable else "not possible"
    return f"reflective relay is {can}; {'requested' if evb.requested else 'not requested'} by this node"


def _table(terminal: bool) -> Table:
    if not terminal:
        return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold dim", padding=(0, 1, 0, 0))


def _add(branch: Tree, found: Iterable[Attachment]) -> None:
    for each in found:
        record = each.record
        name = Text.assemble(
            (record.ifname, "bold"),
            f"  {' '.join(filter(None, (record.device, each.mode)))}  {record.mac}",
            f"  VLAN {each.vlan}" if each.vlan else "",
            "".join(f"  {address}" for address in each.addresses),
            "  ",
            _status(each, terminal=True),
        )
        claim = f"  claim {each.claimed}" if each.claimed else ""
        pod = branch.add(name).add(
            Text.assemble("pod " if each.pod else "sandbox ", (each.sandbox, ""), (claim, "dim"))
        )
        for holder in each.holders:
            vm = f"VM {holder.vm or each.vm}  " if holder.vm or each.vm else ""
            pod.add(
                Text.assemble(
                    (vm, "bold"),
                    f"{holder.program}  pid {holder.pid}  uid {holder.uid}  {count(holder.queues, 'queue')}",
                )
            )


def _source(node: Node, source: Source) -> Text:
    line = Text.assemble((source.name, "bold"), "  ", (source.state, SOURCE[source.state]))
    if source.link:
        kind = source.link.kind or source.driver
        line.append(f"  {kind}" if kind else "")
        line.append(f"  {speed(source.speed)}" if source.speed else "")
        line.append(f"  mtu {source.link.mtu}")
        if source.nics and source.nics != (source.name,):
            line.append(f"  over {', '.join(source.nics)}")
        if source.master:
            line.append(f"  port of {source.master}", style="red")
        line.append(f"  {functions(source)}" if source.most else "")
    for entry in source.entries:
        room = f" {node.count(entry)} of {entry.capacity}" if entry.capacity else ""
        line.append(f"  [{entry.name}{room}]", style="magenta")
    return line


def functions(source: Source) -> str:
    """ "2 of 7 VFs made"."""
    return f"{len(source.functions)} of {source.most} VFs made"


def speed(megabits: int) -> str:
    """10000 → "10 Gb/s"."""
    return f"{megabits / 1000:g} Gb/s" if megabits >= 1000 else f"{megabits} Mb/s"


def _status(each: Attachment, terminal: bool) -> Text:
    sign = "● " if terminal else ""
    return Text(f"{sign}{each.status}", style=STATUS[each.status])


def _named(source: str | None, interface: str | None) -> str | None:
    return f"{source} (interface {interface} of the policy)" if source and interface else source


def _since(each: Attachment) -> str:
    return each.since.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def count(number: int, word: str) -> str:
    """ "1 queue", "2 queues"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def _traffic(counted: Traffic | None) -> str | None:
    if counted is None:
        return None
    dropped = f", {counted.dropped} dropped" if counted.dropped else ""
    return f"{count(counted.packets, 'packet')}, {_size(counted.bytes)}{dropped}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
