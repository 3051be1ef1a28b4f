"""For doctor: can guests in vepa mode reach each other on this node? By the last probe of each source.

Must not probe: two MACs that a switch has never seen can make it shut a port (port security), and doctor is run by
those who only look, as often as they like.
"""

from __future__ import annotations

from cni.kernel import sysfs
from cni.state import probe_results

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.ctl.inventory import Node, Source
    from cni.kernel.sysfs import Sysfs


def examine(run: str, node: Node) -> Iterator[tuple[str, str, str, str]]:
    """A finding, as (check, severity, message, next step), for each source that is used or listed for vepa."""
    with sysfs.mounted() as own:
        for source in node.sources:
            listed = any("vepa" in (entry.modes or ()) for entry in source.entries)
            used = any(each.record.mode == "vepa" for each in node.on(source.name))
            if (listed or used) and source.state == "up" and not source.master:  # other findings report those
                yield f"relay {source.name}", *_judged(run, source, own)


def _judged(run: str, source: Source, own: Sysfs) -> tuple[str, str, str]:
    again = f"vmtapctl probe {source.name}"
    known = probe_results.load(run, source.name)
    if known is None:
        what = "not probed since the node started: guests in vepa mode reach each other only if the switch reflects"
        return "warning", what, again
    if known.carrier_changes != own.number(f"{source.name}/carrier_changes"):
        return "warning", f"its carrier has changed since it was probed ({known.time})", again
    if known.reflects is None:
        return (
            "warning",
            f"the probe had no result ({known.time}): {known.why}",
            again,
        )
    if known.reflects:
        return "ok", f"the switch reflects ({known.time}): guests in vepa mode reach each other", ""
    what = f"the switch does not reflect ({known.time}): guests in vepa mode on this node do not reach each other"
    return "warning", what, f"{probe_results.MEND}; then {again}"
