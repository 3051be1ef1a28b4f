"""Warns, once for each source, that attachments in mode vepa need a switch with reflective relay.

Uses the result of the last `vmtapctl probe`. Must not probe: that sends frames, and an administrator has to request it.
"""

from __future__ import annotations

from logging import WARNING

from cni.agent.log import log
from cni.state import probe_results

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.state.record import Record


class VepaWarning:
    """Called with the record of each attachment that an ADD made, from any thread. run: the state folder."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._first: dict[str, Record] = {}

    def __call__(self, record: Record) -> None:
        """Log a warning if it is the first in mode vepa on its source, and no probe has seen the switch reflect."""
        if record.mode != "vepa" or record.source is None:
            return
        if self._first.setdefault(record.source, record) is not record:  # atomic: other threads may be here
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
