"""What an ADD is going to make: the device, its lower device, mode, MAC and MTU.

It follows from the grant and from the source's link, which the caller has looked up. Must not change anything.
"""

from __future__ import annotations

from cni.config import mac as mac_rules
from cni.dataclass import dataclass, replace
from cni.errors import CniError
from cni.kernel.rtnl import ARPHRD_ETHER
from cni.lower import Wanted
from cni.spec import INVALID_NETWORK_CONFIG, SOURCE_MISSING
from cni.state import deviceid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from cni.attach.call import Call
    from cni.config.netconf import NetConf
    from cni.config.policy import Grant
    from cni.kernel.rtnl import Link
    from cni.state.port_profile import Port

PLAIN_TAP_MTU = 1500


@dataclass(frozen=True)
class Plan:
    """What ADD is going to make."""

    device: str
    mode: str | None
    source: Link | None
    mac: str
    mtu: int
    handover: bool = False
    """Whether the link may wait for its guest in vepa mode."""
    lower: Wanted | None = None
    """What the macvtap is to sit on, if not on the plain source. For a virtual function, source is one of the PFs."""
    port: Port | None = None
    """What may pass; None: everything."""


def decide_for(call: Call, grant: Grant, source: Link | None) -> Plan:
    """decide() for a call. Raises CniError 7 or 104; of a source that was renamed, 104 names its present name."""
    if source is None and grant.source is not None:
        from cni.lower import renamed  # noqa: PLC0415 - a source that is missing is rare

        now = renamed.name_now(call.host, call.node.store.records(), grant.source)
        if now:
            raise CniError(
                SOURCE_MISSING,
                f"source device {grant.source!r} is called {now!r} now: correct the policy or the network config, "
                "or give the NIC its name back",
            )
    plan = decide(source, call.conf, grant, call.container_id, call.ifname, arguments=call.arguments)
    if plan.lower and call.request.function:
        return replace(plan, lower=replace(plan.lower, first=call.request.function))
    return plan


def decide(
    source: Link | None,
    conf: NetConf,
    grant: Grant,
    container_id: str,
    ifname: str,
    *,
    arguments: Mapping[str, str],
) -> Plan:
    """source: the link that grant names; None if there is none of that name. arguments: CNI_ARGS.

    Raises CniError 7 or 104.
    """
    if grant.source is not None:
        if source is None:
            raise CniError(
                SOURCE_MISSING,
                f"source device {grant.source!r} is not on this node: plug it in, or correct the policy",
            )
        # The entry for a device restricts it under each of its names. sysfs has VFs by the PF's first name only.
        others = grant.listed & {source.name, *source.altnames}
        if others or (grant.functions and source.name not in grant.sources):
            raise CniError(
                INVALID_NETWORK_CONFIG,
                f"source {grant.source!r} is another name of {min(others, default=source.name)!r}: use that",
            )
        if source.arphrd != ARPHRD_ETHER:
            raise CniError(
                INVALID_NETWORK_CONFIG, f"source device {grant.source!r} is not an Ethernet device"
            )
    bridge = source is not None and source.kind == "bridge"
    device = grant.device or ("tap" if source is None or (bridge and grant.mode == "bridge") else "macvtap")
    if device == "macvtap" and source is None:
        raise CniError(INVALID_NETWORK_CONFIG, "device macvtap needs an interface or a source to sit on")
    if device == "tap":
        _check_tap(conf, grant, source)
    if conf.vlan and conf.vlan.priority and not grant.functions:
        raise CniError(INVALID_NETWORK_CONFIG, "vlanPriority is refused: only type sr-iov can set it")
    mtu = conf.mtu or (source.mtu if source else PLAIN_TAP_MTU)
    if source and mtu > source.mtu:
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"mtu {mtu} is more than the {source.mtu} of source device {source.name!r}",
        )
    mac = conf.mac or mac_rules.derive(grant.derivation, conf.name, container_id, ifname, arguments)
    if grant.macs and (why := grant.macs.refusal(mac, derived=conf.mac is None)):
        raise CniError(INVALID_NETWORK_CONFIG, f"mac: {mac} is refused: {why}")
    return Plan(
        device,
        grant.mode if source else None,
        source,
        mac,
        mtu,
        handover=(
            device == "macvtap"
            and grant.mode == "bridge"
            and not grant.functions
            and grant.handover
            and not _is_below_elsewhere(source)
        ),
        lower=_lower(grant, conf),
        port=_port(grant, conf),
    )


def _port(grant: Grant, conf: NetConf) -> Port | None:
    if grant.port and grant.port.ip_spoof_check and not (conf.ipam or grant.port.addresses):
        raise CniError(
            INVALID_NETWORK_CONFIG,
            "port.ipSpoofCheck is refused without addresses: give ipam, or port.addresses in the policy, "
            "or leave it out",
        )
    return grant.port


def _is_below_elsewhere(source: Link | None) -> bool:
    """Whether a macvtap on the source gets a lower device in another network namespace, which the agent cannot hear."""
    return source is not None and source.kind in ("macvlan", "macvtap") and source.lower_nsid is not None


def _check_tap(conf: NetConf, grant: Grant, source: Link | None) -> None:
    """Raises CniError 7 for what a tap cannot be."""
    if conf.device_id:
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"device tap: {conf.device_id} was allocated, and a tap is no device of a device plugin's; take the "
            "resource name out of the network, or use macvtap",
        )
    if grant.vlan or conf.vlan:
        raise CniError(
            INVALID_NETWORK_CONFIG, "vlan is refused: a bridge sorts its ports itself; use device macvtap"
        )
    if source is None:
        return
    if source.kind != "bridge":
        raise CniError(
            INVALID_NETWORK_CONFIG,
            f"device tap: source {source.name!r} is no Linux bridge; use macvtap on a NIC, or name a bridge",
        )
    if grant.mode == "vepa":
        raise CniError(
            INVALID_NETWORK_CONFIG,
            "mode vepa: a tap on a Linux bridge cannot have it, as the bridge delivers between its own ports; "
            "use bridge, pepa, or a macvtap on the NIC",
        )


def _lower(grant: Grant, conf: NetConf) -> Wanted | None:
    if entry := grant.functions:
        if tag := grant.vlan:
            settings = replace(entry.settings, vlan=(tag.id, tag.priority, tag.ethertype))
            entry = replace(entry, settings=settings)
        device = deviceid.parse(conf.device_id or "")
        return Wanted(functions=entry, number=device[1] if device else None)
    offload = grant.type == "vmdq"
    return Wanted(vlan=grant.vlan, offload=offload, mtu=conf.mtu) if grant.vlan or offload else None
