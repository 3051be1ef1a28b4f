"""One result of `vmtapctl doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """severity: "ok", "warning" or "error"; next_step is empty for the first only."""

    check: str
    severity: str
    message: str
    next_step: str = ""

    def document(self) -> dict[str, str]:
        """For programs."""
        return {
            "check": self.check,
            "severity": self.severity,
            "message": self.message,
            "nextStep": self.next_step,
        }
