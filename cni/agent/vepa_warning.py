"""Tells once, for each source, that what was attached in vepa mode needs a switch that reflects.

By what `vmtapctl probe` last found. Must not probe: an ADD is no time for it, and nobody asked.
"""

from __future__ import annotations

from logging import WARNING

from cni.agent.log import log
from cni.state import probe_results

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.state.record import Record


class Relay:
    """Called with each attachment that was made, by any thread."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._seen: dict[str, Record] = {}

    def __call__(self, record: Record) -> None:
        """Log, if it is the first in vepa mode on its source, and nobody has seen that switch reflect."""
        if record.mode != "vepa" or record.source is None:
            return
        if self._seen.setdefault(record.source, record) is not record:  # one step, for two at once
            return
        known = probe_results.load(self._run, record.source)
        if not (known and known.reflects):
            log(
                WARNING,
                "guests of this node will not reach each other unless the switch reflects",
                source=record.source,
                probed=f"{known.time}: {known.why}" if known else "never",
                next=f"vmtapctl probe {record.source}",
            )
