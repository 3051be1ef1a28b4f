"""The node's policy file → Policy; what a network configuration asks for, under a policy → Grant.

A node's administrator writes which devices VMs may use, and how. A pod's author picks an entry, and can never widen it:
everything here fails closed. Must not look at the network: the caller finds out whether a device exists.
"""

from __future__ import annotations

import os

from cni import spec
from cni.config import nodefile, schema
from cni.config import port as ports
from cni.config.mac import PLAIN, Derivation, Rules, with_colons
from cni.config.mac import rules as mac_rules
from cni.config.netconf import Vlan, canonical
from cni.dataclass import dataclass, field, replace
from cni.errors import CniError, reason
from cni.kernel.vf_settings import VfSettings
from cni.state import deviceid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from cni.config.netconf import NetConf
    from cni.state.port_profile import Port

MODES = ("bridge", "vepa", "pepa")
"""The modes that an entry without modes allows. The first is the default: it works with any switch."""

IMPOSSIBLE = {
    ("sr-iov", "pepa"): "no NIC's embedded switch can keep its virtual functions apart",
    ("tap", "vepa"): "a tap is a port of a bridge, and bridges deliver between their ports themselves",
}
"""(type or device, mode) → why it is impossible."""

LINK_STATES = ("auto", "enable", "disable")
"""In the order of the kernel's numbers, IFLA_VF_LINK_STATE_*."""


@dataclass(frozen=True)
class Functions:
    """What an entry of type sr-iov gives for its virtual functions."""

    pool: tuple[str, ...]
    """The PFs, in the order to try."""
    vfs: int | None
    """How many to make of a PF that has none."""
    settings: VfSettings
    """What each VF is to be set to; None: it stays as it is."""


@dataclass(frozen=True)
class Interface:
    """One entry of the policy file."""

    name: str
    dev: str
    """The source; of several, the first."""
    type: str
    modes: tuple[str, ...] | None
    """None: no restriction."""
    capacity: int | None
    functions: Functions | None = None
    vlans: tuple[int, ...] | None = None
    """None: any VLAN, and none by default."""
    handover: bool = True
    """Whether a macvtap in bridge mode may wait for its guest."""
    macs: Rules | None = None
    """Which MACs guests may have; None: as the policy has it."""
    bcqueuelen: int | None = 1000
    """The largest queue of broadcast frames that may be requested; None: no restriction."""
    port: Mapping[str, Any] | None = field(default_factory=dict)
    """What every port is to have, as config/port.py reads it; None: what the network config says."""

    @property
    def devices(self) -> int:
        """How many devices the device plugin offers; for type sr-iov at most, as it offers the VFs that are there."""
        return self.capacity or (deviceid.MOST if self.functions else deviceid.DEFAULT_CAPACITY)

    @property
    def sources(self) -> tuple[str, ...]:
        """The devices that may be the source."""
        return self.functions.pool if self.functions else (self.dev,)


@dataclass(frozen=True)
class Policy:
    interfaces: tuple[Interface, ...]
    allow_unlisted: bool
    derivation: Derivation = PLAIN
    macs: Rules | None = None
    """Which MACs guests may have where no entry says; None: any."""
    ipam_types: tuple[str, ...] | None = None
    """The IPAM plugins that network configs may name; None: any."""

    def allows_delegate(self, type: str) -> bool:
        """Whether a network config may name the IPAM plugin."""
        return self.ipam_types is None or type in self.ipam_types


@dataclass(frozen=True)
class Grant:
    """What a network configuration may have.

    source and mode are None for a plain tap only. device is None if it follows from the source. interface is the name
    of the policy entry; None if no entry names the source.
    """

    interface: str | None
    source: str | None
    device: str | None
    mode: str | None
    type: str
    functions: Functions | None = None
    vlan: Vlan | None = None
    handover: bool = True
    macs: Rules | None = None
    derivation: Derivation = PLAIN
    listed: frozenset[str] = frozenset()
    """The devices that entries of the policy name, of which the source must be none, under whatever name."""
    port: Port | None = None
    """What may pass; None: everything."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The devices that may be the source; () for a plain tap."""
        return self.functions.pool if self.functions else tuple(filter(None, (self.source,)))


def authorize(policy: Policy | None, conf: NetConf, *, delegate: bool = True) -> Grant:
    """What the policy grants to the config. delegate: whether it must allow the IPAM plugin, too.

    Raises CniError 7, with a list of what is allowed, if it grants nothing.
    """
    grant = _authorize(policy, conf)
    if policy is None:
        return grant
    if conf.ipam and delegate and not policy.allows_delegate(conf.ipam["type"]):
        allowed = schema.listed(policy.ipam_types or ())
        raise _refusal("ipam.type", conf.ipam["type"], f"ipamTypes of the policy are: {allowed}")
    macs = (grant.macs or policy.macs) if grant.source else None
    return replace(grant, derivation=policy.derivation, macs=macs)


def left_to_kubelet(conf: NetConf) -> bool:
    """Whether the config names no device itself, so that an ADD needs the deviceID that the kubelet allocates."""
    return not (conf.interface or conf.source or conf.device_id or conf.device == "tap")


def _authorize(policy: Policy | None, conf: NetConf) -> Grant:
    entries = policy.interfaces if policy else ()
    name = _selected(conf)
    if name is not None:
        entry = _named(policy, name, conf)
        if conf.source is not None and conf.source not in entry.sources:
            known = schema.listed(entry.sources)
            raise _refusal(
                "source", conf.source, f"interface {entry.name} is {known}; leave one of the two out"
            )
        return _grant(entry, conf)
    if conf.source is not None:
        listed = [entry for entry in entries if conf.source in entry.sources]
        if listed:
            return _grant(_first_that_allows(listed, conf), conf)
        if policy and not policy.allow_unlisted:
            raise _refusal("source", conf.source, f"the policy does not list it; {_choices(policy)}")
        unlisted = Interface("", conf.source, "ethernet", None, None)
        grant = _grant(unlisted if policy else replace(unlisted, bcqueuelen=None, port=None), conf)
        return replace(grant, listed=frozenset(dev for entry in entries for dev in entry.sources))
    if conf.device == "tap":
        if conf.mode is not None:
            raise _refusal(
                "mode", conf.mode, "a plain tap has no wire; give an interface or a source as well"
            )
        if conf.port:
            raise _refusal("port", "", "a plain tap has no wire; give an interface or a source as well")
        # A plain tap reaches no wire, so the policy does not concern it.
        return Grant(None, None, "tap", None, "ethernet")
    wanted = "give interface, source, a deviceID of the form NAMEMvpN, or device tap for a plain tap"
    if conf.device_id is not None:
        raise _refusal("deviceID", conf.device_id, f"it names no interface; {wanted}; {_choices(policy)}")
    raise CniError(spec.INVALID_NETWORK_CONFIG, f"interface: is missing; {wanted}; {_choices(policy)}")


def _selected(conf: NetConf) -> str | None:
    """The name of the entry: from interface, or from the id of the kubelet's device, which has the form NAMEMvpN."""
    device = deviceid.parse(conf.device_id or "")
    if conf.interface is None or device is None:
        return conf.interface or (device and device[0])
    if conf.interface != device[0]:
        raise _refusal(
            "interface", conf.interface, f"the allocated deviceID {conf.device_id} is of another one"
        )
    return conf.interface


def _named(policy: Policy | None, name: str, conf: NetConf) -> Interface:
    given = ("interface", name) if conf.interface else ("deviceID", conf.device_id)
    if policy is None:
        raise _refusal(*given, f"this node has no policy file that could define {name}")
    names = [entry.name for entry in policy.interfaces]
    if name not in names:
        raise _refusal(*given, f"the policy has no interface {name}; {schema.nearest(name, names)}")
    return policy.interfaces[names.index(name)]


def _first_that_allows(entries: list[Interface], conf: NetConf) -> Interface:
    for entry in entries:
        if conf.mode is None or entry.modes is None or conf.mode in entry.modes:
            return entry
    modes = dict.fromkeys(mode for entry in entries for mode in entry.modes or ())
    raise _refusal("mode", conf.mode, f"on {conf.source} the policy allows {', '.join(modes)}")


def _grant(entry: Interface, conf: NetConf) -> Grant:
    """What the entry grants. An entry without a name is for a device that the policy does not list."""
    device = deviceid.parse(conf.device_id or "")
    if device and device[1] >= entry.devices:
        raise _refusal(
            "deviceID",
            conf.device_id,
            f"interface {entry.name} offers {entry.devices} devices, {deviceid.format(entry.name, 0)} to "
            f"{deviceid.format(entry.name, entry.devices - 1)}; raise its capacity, or restart the pod",
        )
    mode = conf.mode
    if mode is None:
        possible = [mode for mode in entry.modes or MODES if not _impossible(entry, conf, mode)]
        mode = possible[0] if possible else (entry.modes or MODES)[0]
    if entry.modes and mode not in entry.modes:
        raise _refusal("mode", mode, f"interface {entry.name} allows {', '.join(entry.modes)}")
    if reason := _impossible(entry, conf, mode):
        raise _refusal("mode", mode, reason)
    if conf.bcqueuelen is not None and entry.bcqueuelen is not None and conf.bcqueuelen > entry.bcqueuelen:
        raise _refusal(
            "bcqueuelen",
            conf.bcqueuelen,
            f"the policy allows at most {entry.bcqueuelen} on {entry.dev}, whose macvtaps share the queue",
        )
    functions, dev = entry.functions, entry.dev
    if functions and conf.source:
        if device and len(functions.pool) > 1:  # the device's number is counted through the pool
            raise _refusal("source", conf.source, f"deviceID {conf.device_id} says which; leave it out")
        functions, dev = replace(functions, pool=(conf.source,)), conf.source
    # The kubelet allocates a device node, and a tap has none.
    made = conf.device or ("macvtap" if device else None)
    handover = entry.handover and conf.handover
    vlan = _vlan(entry, conf)
    port = ports.decide(
        entry.port or {},
        conf.port or {},
        conf.bandwidth or {},
        free=entry.port is None,
        on_vlan=bool(vlan and vlan.id),
    )
    return Grant(
        entry.name or None, dev, made, mode, entry.type, functions, vlan, handover, entry.macs, port=port
    )


def _vlan(entry: Interface, conf: NetConf) -> Vlan | None:
    if entry.vlans is None:
        return conf.vlan
    asked = conf.vlan.id if conf.vlan else entry.vlans[0]
    if asked not in entry.vlans:
        raise _refusal(
            "vlan", str(asked), f"interface {entry.name} allows {schema.listed([*map(str, entry.vlans)])}"
        )
    return conf.vlan or Vlan(asked)


def _impossible(entry: Interface, conf: NetConf, mode: str) -> str | None:
    return IMPOSSIBLE.get((entry.type, mode)) or IMPOSSIBLE.get((conf.device or "", mode))


def _choices(policy: Policy | None) -> str:
    if policy is None:
        return "this node has no policy file, so any device may be the source"
    return f"interfaces are: {schema.listed([entry.name for entry in policy.interfaces])}"


def _refusal(key: str, value: str | int | None, reason: str) -> CniError:
    return CniError(spec.INVALID_NETWORK_CONFIG, f"{key}: {schema.show(value)} is refused: {reason}")


def load(path: str | os.PathLike[str]) -> Policy | None:
    """The policy in the file; None if there is no file. Raises CniError 7 as nodefile.read() does."""
    path = os.fspath(path)
    document = nodefile.read(path, schema.load("policy"))
    return None if document is None else of(path, document)


def of(path: str, document: dict[str, Any]) -> Policy:
    """The policy of a document that is valid by the schema. path: what errors name. Raises CniError 7."""
    rules = schema.load("policy")
    entry_defaults = schema.defaults(rules["properties"]["interfaces"]["items"])
    interfaces: list[Interface] = []
    numbers: dict[str, int] = {}
    for number, each in enumerate(document.get("interfaces") or ()):
        entry = entry_defaults | each
        other = numbers.setdefault(entry["name"], number)
        if other != number:
            where = f"{path}: interfaces[{number}].name"
            raise _refusal(where, entry["name"], f"it is the name of interfaces[{other}] already")
        dev = entry["source"]["dev"]
        pool = tuple(dict.fromkeys([dev] if isinstance(dev, str) else dev))
        if not pool:
            raise _refusal(f"{path}: interfaces[{number}].source.dev", "", "the list is empty")
        modes = tuple(dict.fromkeys(map(canonical, entry.get("modes") or ())))
        interfaces.append(
            Interface(
                name=entry["name"],
                dev=pool[0],
                type=entry["type"],
                modes=modes or None,
                capacity=int(entry["capacity"]) if "capacity" in entry else None,
                functions=_functions(path, number, entry, pool),
                vlans=tuple(map(int, entry.get("vlans") or ())) or None,
                handover=entry["handover"],
                macs=_macs(f"{path}: interfaces[{number}].mac", entry),
                bcqueuelen=int(entry["bcqueuelen"]),
                port=_port(f"{path}: interfaces[{number}]", entry),
            )
        )
    derivation = Derivation(document.get("macSeed", ""), with_colons(document.get("macPrefix", "")))
    unlisted = (schema.defaults(rules) | document)["allowUnlisted"]
    types = document.get("ipamTypes")
    return Policy(
        tuple(interfaces),
        unlisted,
        derivation,
        macs=_macs(f"{path}: mac", document),
        ipam_types=None if types is None else tuple(types),
    )


def _macs(where: str, fields: dict[str, Any]) -> Rules | None:
    try:
        return mac_rules(fields["mac"]) if "mac" in fields else None
    except ValueError as error:
        raise _refusal(where, reason(error), "the range ends before it begins") from error


def _port(where: str, entry: dict[str, Any]) -> dict[str, Any]:
    port: dict[str, Any] = entry.get("port") or {}
    try:
        ports.decide(port, {}, {}, free=False)
    except CniError as error:
        raise CniError(error.code, f"{where}.{error.msg}") from error
    return port


def _functions(path: str, number: int, entry: dict[str, Any], pool: tuple[str, ...]) -> Functions | None:
    """The entry's fields for VFs; None for other types. Raises CniError 7 if another type has such a field."""
    where = f"{path}: interfaces[{number}]"
    if entry["type"] != "sr-iov":
        for key in ("vfs", "spoofchk", "trust", "minTxRate", "maxTxRate", "linkState"):
            if key in entry:
                raise _refusal(
                    f"{where}.{key}", str(entry[key]), f"type {entry['type']} has no virtual functions"
                )
        if len(pool) > 1:
            raise _refusal(f"{where}.source.dev", ", ".join(pool), f"type {entry['type']} has one device")
        return None
    settings: dict[str, Any] = {key: int(entry[key]) for key in ("spoofchk", "trust") if key in entry}
    port = entry.get("port") or {}
    if port.get("macSpoofCheck") and not port.get("macs"):  # the NIC knows one MAC for each function
        settings.setdefault("spoofchk", 1)
    if "minTxRate" in entry or "maxTxRate" in entry:
        settings["rate"] = (int(entry.get("minTxRate", 0)), int(entry.get("maxTxRate", 0)))
    if "linkState" in entry:
        settings["link_state"] = LINK_STATES.index(entry["linkState"])
    return Functions(pool, int(entry["vfs"]) if "vfs" in entry else None, VfSettings(**settings))
