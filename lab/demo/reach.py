"""Who reaches whom: pings between the guests, and to the peer machine."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import TYPE_CHECKING

from lab.demo.cases import CASES, Reach, other_guest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lab.demo.cases import Attachment, Case, Seen
    from lab.demo.show import Show
    from lab.guest import Guest
    from lab.wire import Lab

PING = "ping -c 3 -W 3"
"""One answer to three requests is enough, up to three seconds after the last: the machine may be busy."""
_TRIES = 3


def measure(
    lab: Lab,
    guests: Mapping[str, Guest],
    attachments: Mapping[str, Mapping[str, Attachment]],
    show: Show,
) -> list[tuple[Case, Seen]]:
    """Measures every case: first those of a plain switch, then those of a reflecting one."""
    seen: dict[tuple[str, bool], Seen] = {}
    for reflecting in (False, True):
        lab.switch.reflect(reflecting)
        networks = [case.network for case in CASES if case.reflecting == reflecting]
        with show.step(
            f"who reaches whom while the switch {'reflects' if reflecting else 'does not reflect'}"
        ):
            pinged = {network: _ping(network, guests, attachments) for network in networks}
            for network, answers in pinged.items():
                seen[network, reflecting] = answers()
            for case in CASES:
                if case.reflecting == reflecting:
                    _ping_again(case, seen[case.network, reflecting], guests, attachments)
    return [(case, seen[case.network, case.reflecting]) for case in CASES]


def _ping_again(
    case: Case,
    seen: Seen,
    guests: Mapping[str, Guest],
    attachments: Mapping[str, Mapping[str, Attachment]],
) -> None:
    """Repeats the pings while one that should be answered is not: a guest may have had no processor for seconds.

    Updates seen; a ping that was answered once counts as answered.
    """
    for _ in range(_TRIES):
        if all(not getattr(case.expected, kind) or all(reached.values()) for kind, reached in seen.items()):
            return
        for kind, reached in _ping(case.network, guests, attachments)().items():
            seen[kind] = {name: seen[kind][name] or there for name, there in reached.items()}


def _ping(
    network: str, guests: Mapping[str, Guest], attachments: Mapping[str, Mapping[str, Attachment]]
) -> Callable[[], Seen]:
    """Starts the pings of both guests on one network; the function that it returns waits for their results."""
    pings = {}
    for name, guest in guests.items():
        other, own = (attachments[who][network] for who in (other_guest(name), name))
        addresses = {"guest": str(other.address.ip), "peer": own.gateway}
        replies = {who: guest.ask(f"{PING} {address}") for who, address in addresses.items()}
        broadcast = guest.ask(f"{PING} {own.address.network.broadcast_address}")
        pings[name] = (addresses, replies, broadcast)

    def answers() -> Seen:
        seen: Seen = {field.name: {} for field in fields(Reach)}
        for name, (addresses, replies, broadcast) in pings.items():
            answered = set(re.findall(r"bytes from ([\d.]+)", broadcast().output))
            for who, address in addresses.items():
                seen[f"{who}_unicast"][name] = replies[who]().status == 0
                seen[f"{who}_broadcast"][name] = address in answered
        return seen

    return answers
