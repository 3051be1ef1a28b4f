"""What the doctor finds about ports: whether the kernel can filter, and attachments that a changed policy missed."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace

from cni.config import port as ports
from cni.ctl import self_test
from cni.ctl.finding import Finding
from cni.errors import CniError, reason
from cni.kernel.rtnl import Rtnl
from cni.port import guard
from cni.state.port_profile import Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cni.config.policy import Policy
    from cni.ctl.inventory import Node


def kernel(rules: Policy | None) -> Iterator[Finding]:
    """Whether the kernel can do what each interface's port needs. Nothing if the policy has no ports."""
    wanted = {
        entry.name: port
        for entry in (rules.interfaces if rules else ())
        if (port := ports.decide(entry.port or {}, {}, {}, free=False))
    }
    if not wanted:
        return
    failed: dict[str, str] = {}
    thread = threading.Thread(target=_try, args=(wanted, failed), name="trial")
    thread.start()
    thread.join()
    for name, why in failed.items():
        yield Finding(
            "port", "error", f"interface {name}: {why}", "until then its ADDs are refused (code 100)"
        )
    if not failed:
        yield Finding("port", "ok", f"the kernel can do what the ports of {', '.join(wanted)} need (tested)")


def _try(wanted: Mapping[str, Port], failed: dict[str, str]) -> None:
    """Put each port in force at the loopback device of a new network namespace, and note why one is refused."""
    with ExitStack() as stack:
        try:
            self_test.leave(stack)
            own = stack.enter_context(Rtnl())
        except OSError as error:
            failed.update(dict.fromkeys(wanted, f"no network namespace can be made: {error.strerror}"))
            return
        for name, port in wanted.items():
            try:
                guard.put(replace(self_test.RECORD, ifname="lo", ifindex=1, port=port), own)
            except CniError as error:
                failed[name] = reason(error)


def wider(rules: Policy | None, node: Node) -> Iterator[Finding]:
    """The attachments that let more pass than the policy has now: their port is that of their ADD."""
    entries = {entry.name: entry for entry in rules.interfaces} if rules else {}
    for each in node.attachments:
        entry = entries.get(each.record.interface or "")
        if entry is None or each.status in ("gone", "old"):
            continue
        bound = ports.decide(entry.port or {}, {}, {}, free=False, on_vlan=each.vlan is not None)
        fields = (each.record.port or Port()).wider_than(bound or Port())
        if fields:
            yield Finding(
                f"{each.sandbox} {each.record.ifname}",
                "warning",
                f"its port is wider than that of interface {entry.name} now: {', '.join(fields)}",
                "give the VM a new pod: a changed port is in force for new attachments",
            )
