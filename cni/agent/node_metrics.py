"""Metrics of attachments, capacity, policy and the agent's process, computed at each scrape. Changes nothing."""

from __future__ import annotations

import os
import resource
from collections import Counter

from cni.lower import vf_discovery

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.metrics import Labels, Registry
    from cni.config.policy import Policy
    from cni.state.store import Store

_PAGE = resource.getpagesize()


def declare(
    registry: Registry, store: Store, policy: Callable[[], Policy | None], valid: Callable[[], bool]
) -> None:
    """Declare them on the registry. valid: whether the policy file as it is now is in force."""

    def attachments() -> dict[Labels, float]:
        return dict(
            Counter(
                (record.interface or "", record.source or "", record.mode or "", record.device)
                for record in store.records()
            )
        )

    def capacity() -> dict[Labels, float]:
        known = policy()
        interfaces = known.interfaces if known else ()
        return {(each.name,): each.capacity for each in interfaces if each.capacity is not None}

    def functions() -> dict[Labels, float]:
        known = policy()
        pools = (each.functions.pool for each in known.interfaces if each.functions) if known else ()
        return {
            (pf, state): count
            for pf in dict.fromkeys(pf for pool in pools for pf in pool)
            for state, count in _functions(pf, store).items()
        }

    registry.computed(
        "vmtap_attachments",
        "Attachments that the node has a record of.",
        *("interface", "source", "mode", "device"),
        look=attachments,
    )
    registry.computed(
        "vmtap_interface_capacity",
        "How many attachments the policy allows on an interface, where it says so.",
        "interface",
        look=capacity,
    )
    registry.computed(
        "vmtap_virtual_functions",
        "Virtual functions of the policy's NICs. other: without a link, so that no attachment gets one.",
        *("source", "state"),
        look=functions,
    )
    registry.computed(
        "vmtap_policy_valid",
        "1 if the policy file is good, or there has been none; 0 if it is refused or gone: the last good one stays.",
        look=lambda: {(): valid()},
    )
    registry.computed(
        "process_cpu_seconds_total",
        "CPU time of the agent, its delegates left out.",
        look=lambda: {(): sum(os.times()[:2])},
        kind="counter",
    )
    registry.computed(
        "process_resident_memory_bytes", "Resident memory of the agent.", look=lambda: {(): _resident()}
    )
    registry.computed(
        "process_open_fds",
        "Open file descriptors of the agent.",
        look=lambda: {(): len(os.listdir("/proc/self/fd"))},
    )


def _functions(pf: str, store: Store) -> dict[str, float]:
    made = vf_discovery.functions(pf)
    held = {pci for pci, _ in store.functions_held()}
    attached = sum(each.pci in held for each in made)
    free = sum(each.link is not None and each.pci not in held for each in made)
    return {
        "attached": attached,
        "free": free,
        "other": len(made) - attached - free,
        "unmade": vf_discovery.most(pf) - len(made),
    }


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE
