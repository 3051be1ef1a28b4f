"""What the demo measures and expects: the rows of its table, and the outcome of a run."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

GUESTS = ("a", "b")


@dataclass(frozen=True)
class Reach:
    """Who reaches whom: guest ↔ guest and guest ↔ peer machine, by unicast and by broadcast."""

    guest_unicast: bool
    guest_broadcast: bool
    peer_unicast: bool = True
    peer_broadcast: bool = True


@dataclass(frozen=True)
class Case:
    """A row of the table. reflecting: whether the switch is a reflective relay at the NIC of the macvtaps."""

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
    # Linux drops only broadcasts and multicasts of what the switch reflects to a macvtap in private mode.
    Case("macvtap", "pepa", True, Reach(guest_unicast=True, guest_broadcast=False)),
    Case("macvtap", "bridge", False, Reach(guest_unicast=True, guest_broadcast=True)),
    Case("macvtap", "bridge", True, Reach(guest_unicast=True, guest_broadcast=True)),
    Case("tap", "bridge", False, Reach(guest_unicast=True, guest_broadcast=True)),
    Case("tap", "pepa", False, Reach(guest_unicast=False, guest_broadcast=False)),
)
IFNAMES = {
    network: f"net{n}" for n, network in enumerate(dict.fromkeys(case.network for case in CASES), start=1)
}
"""Network → ifname in the pods."""

Seen = dict[str, dict[str, bool]]
"""Field of Reach → guest → whether it reached the other end."""


def as_expected(case: Case, seen: Seen) -> bool:
    """Whether each guest reached exactly what the case expects."""
    return all(reached == getattr(case.expected, kind) for kind in seen for reached in seen[kind].values())


@dataclass(frozen=True)
class Outcome:
    """The results of a run. seconds: of the whole run; left: what was not removed."""

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
        """The JSON document of `--json`."""
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


@dataclass(frozen=True)
class Attachment:
    """What the result of an ADD gives a guest."""

    mac: str
    address: ipaddress.IPv4Interface
    gateway: str


def other_guest(name: str) -> str:
    return GUESTS[1 - GUESTS.index(name)]
