"""A picture of the node for a ticket: switch port → NIC → attachment → pod → VM, as one SVG file.

No scripts, no fonts, no references: it opens anywhere. Colour repeats what a box says in words. Must not look
anything up.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import pairwise

from cni.ctl.render import functions, speed
from cni.names import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni.ctl.inventory import Attachment, Node, Source

_WIDTHS = {"switch port": 180, "NIC": 262, "attachment": 290, "pod": 270, "VM": 210}
_GAP, _MARGIN, _TOP = 56, 28, 112
_BOX, _ROW, _GROUP = 44, 56, 16
_GREEN, _GREY, _BLUE, _AMBER, _RED = "#1a7f37", "#6e7781", "#0969da", "#bf8700", "#cf222e"
COLOURS = {
    "in use": _GREEN,
    "up": _GREEN,
    "idle": _GREY,
    "in progress": _BLUE,
    "no carrier": _AMBER,
    "down": _AMBER,
    "gone": _RED,
    "old": _RED,
    "missing": _RED,
}
_STYLE = (
    "text{font-family:system-ui,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#1f2328}"
    ".t{font-size:13px;font-weight:600}.s{font-size:11px;fill:#59636e}"
    ".h{font-size:19px;font-weight:600}.c{font-size:11px;font-weight:600;fill:#59636e;letter-spacing:.06em}"
)


@dataclass
class _Box:
    """A box. y: its middle. to: the boxes on its left that it is connected to."""

    title: str
    subtitle: str
    colour: str
    y: float
    to: tuple[_Box, ...] = ()
    x: float = 0
    width: float = 0


def draw(node: Node) -> str:
    """The SVG document."""
    columns = _columns(node)
    x = float(_MARGIN)
    for title, boxes in columns.items():
        for box in boxes:
            box.x, box.width = x, _WIDTHS[title]
        x += _WIDTHS[title] + _GAP
    width = x - _GAP + _MARGIN
    height = max((box.y for boxes in columns.values() for box in boxes), default=_TOP) + _BOX / 2 + 54
    used = sum(each.status == "in use" for each in node.attachments)
    summary = f"{node.time:%Y-%m-%d %H:%M:%S %Z}, {len(node.attachments)} attachments, {used} in use"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_xml(f"node {node.name}, {summary}")}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        f'<text class="h" x="{_MARGIN}" y="42">{_xml(_cut(f"node {node.name}", width - 2 * _MARGIN, 11))}</text>',
        f'<text class="s" x="{_MARGIN}" y="62">{_xml(summary)}</text>',
    ]
    x = _MARGIN
    for title, boxes in columns.items():
        parts.append(f'<text class="c" x="{x}" y="{_TOP - 18}">{_xml(title.upper())}</text>')
        parts += (
            _edge(other, box, (other if title == "pod" else box).colour) for box in boxes for other in box.to
        )
        x += _WIDTHS[title] + _GAP
    parts += (_rect(box) for boxes in columns.values() for box in boxes)
    parts += _legend(
        {each.status for each in node.attachments} | {each.state for each in node.sources}, height
    )
    return "\n".join([*parts, "</svg>", ""])


def _columns(node: Node) -> dict[str, list[_Box]]:
    """The boxes by column. A box is at the middle of the boxes connected to it, as far as there is room."""
    attached: list[tuple[Attachment, _Box]] = []
    nics: list[_Box] = []
    switches: dict[str, list[_Box]] = {}
    y = float(_TOP + _BOX / 2)
    for source in [*node.sources, None]:
        found = node.on(source.name if source else None)
        if source is None and not found:
            continue
        top = y
        nic = _nic(node, source) if source else None
        for each in found:
            attached.append((each, _attachment(each, y, nic)))
            y += _ROW
        y = max(y, top + _ROW if nic else y)
        if nic:
            nic.y = (top + y - _ROW) / 2
            nics.append(nic)
            for neighbour in source.neighbours if source else ():
                switches.setdefault(f"{neighbour.system}\n{neighbour.port}", []).append(nic)
        y += _GROUP
    ports = []
    for name, below in switches.items():
        system, _, port = name.partition("\n")
        box = _Box(system, f"port {port}", _GREY, _middle(below))
        for nic in below:
            nic.to = (*nic.to, box)
        ports.append(box)
    pods: dict[tuple[str, str], list[tuple[Attachment, _Box]]] = {}
    for each, box in attached:
        pods.setdefault((each.record.container_id, each.sandbox), []).append((each, box))
    sandboxes, machines = [], []
    for (container, sandbox), members in pods.items():
        boxes = tuple(box for _, box in members)
        namespace, _, name = sandbox.rpartition("/")
        subtitle = f"pod in {namespace}" if namespace else f"sandbox {container[:12]}"
        colour = _GREEN if any(box.colour == _GREEN for box in boxes) else _GREY
        pod = _Box(name, subtitle, colour, _middle(boxes), boxes)
        sandboxes.append((pod, members))
    _spread([pod for pod, _ in sandboxes])
    for pod, members in sandboxes:
        holders = {holder.pid: (holder, each.vm) for each, _ in members for holder in each.holders}
        for holder, vm in holders.values():
            machines.append(
                _Box(vm or holder.program, f"{holder.program} {holder.pid}", _GREEN, pod.y, (pod,))
            )
    _spread(ports)
    _spread(machines)
    columns = {
        "switch port": ports,
        "NIC": nics,
        "attachment": [box for _, box in attached],
        "pod": [pod for pod, _ in sandboxes],
        "VM": machines,
    }
    return {title: boxes for title, boxes in columns.items() if boxes or title not in ("switch port", "VM")}


def _nic(node: Node, source: Source) -> _Box:
    facts = [source.state]
    if source.link:
        kind = source.link.kind if source.link.kind in ("bridge", "bond", "vlan") else ""
        over = f"over {', '.join(source.nics)}" if source.nics not in ((), (source.name,)) else ""
        facts.append(" ".join(filter(None, (kind, over))))
        facts += [speed(source.speed)] if source.speed else []
        facts.append(f"mtu {source.link.mtu}")
        facts += [functions(source)] if source.most else []
    names = ", ".join(
        f"{entry.name} {node.count(entry)}/{entry.capacity}" if entry.capacity else entry.name
        for entry in source.entries
    )
    title = f"{source.name}  [{names}]" if names else source.name
    return _Box(title, " · ".join(fact for fact in facts if fact), COLOURS[source.state], 0)


def _attachment(each: Attachment, y: float, nic: _Box | None) -> _Box:
    record = each.record
    mode = f"{record.device} {each.mode}" if each.mode else record.device
    address = f"  {each.addresses[0]}" if each.addresses else ""
    return _Box(
        f"{record.ifname}{address}",
        " · ".join(filter(None, (each.status, each.function, mode, record.mac))),
        COLOURS[each.status],
        y,
        (nic,) if nic else (),
    )


def _middle(boxes: Iterable[_Box]) -> float:
    ys = [box.y for box in boxes]
    return sum(ys) / len(ys)


def _spread(boxes: list[_Box]) -> None:
    """Move boxes down until none overlaps another, in the order of their wanted positions."""
    for above, box in pairwise(sorted(boxes, key=lambda box: box.y)):
        box.y = max(box.y, above.y + _ROW)


def _edge(left: _Box, right: _Box, colour: str) -> str:
    x1, x2 = left.x + left.width, right.x
    bend = (x2 - x1) / 2
    dash = "" if colour in (_GREEN, _GREY) else ' stroke-dasharray="5 4"'
    return (
        f'<path d="M{x1:g} {left.y:g}C{x1 + bend:g} {left.y:g} {x2 - bend:g} {right.y:g} {x2:g} {right.y:g}" '
        f'fill="none" stroke="{colour}" stroke-width="1.6" stroke-opacity=".65"{dash}/>'
    )


def _rect(box: _Box) -> str:
    top = box.y - _BOX / 2
    room = box.width - 24
    return (
        f"<g><title>{_xml(f'{box.title}: {box.subtitle}')}</title>"
        f'<rect x="{box.x:g}" y="{top:g}" width="{box.width:g}" height="{_BOX}" rx="7" fill="#f6f8fa" '
        f'stroke="#d1d9e0"/>'
        f'<rect x="{box.x:g}" y="{top + 7:g}" width="4" height="{_BOX - 14}" rx="2" fill="{box.colour}"/>'
        f'<text class="t" x="{box.x + 14:g}" y="{top + 19:g}">{_xml(_cut(box.title, room, 7.6))}</text>'
        f'<text class="s" x="{box.x + 14:g}" y="{top + 35:g}">{_xml(_cut(box.subtitle, room, 6.0))}</text></g>'
    )


def _legend(present: set[str], height: float) -> Iterable[str]:
    x = float(_MARGIN)
    for status, colour in COLOURS.items():
        if status in present:
            yield f'<circle cx="{x + 5:g}" cy="{height - 24:g}" r="5" fill="{colour}"/>'
            yield f'<text class="s" x="{x + 16:g}" y="{height - 20:g}">{status}</text>'
            x += 36 + 6.4 * len(status)


def _cut(text: str, room: float, letter: float) -> str:
    """As much of the text as fits, by the width of an average letter. The box's tooltip has all of it."""
    most = int(room / letter)
    return text if len(text) <= most else text[: most - 1] + "…"


def _xml(text: str) -> str:
    """The text escaped for XML, after unprintable characters, which XML forbids in part."""
    return escape(escaped(text))
