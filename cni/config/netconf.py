"""The bytes on standard input and CNI_ARGS → one frozen NetConf, or a CniError that explains what is wrong.

It finds every fault that shows without a look at the node. schema/netconf.json has the fields, their defaults and
limits. Here is what a schema cannot express: the version gate, and which source of a value counts.
Must not read the environment, the policy or the network.
"""

from __future__ import annotations

from functools import cache, cached_property, lru_cache

from cni import spec
from cni.config import delegation, schema
from cni.config.decoding import decode
from cni.config.mac import with_colons
from cni.dataclass import dataclass, replace
from cni.errors import CniError
from cni.names import printable
from cni.state import deviceid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

MAX_BYTES = 1 << 20
COMMAND_BYTES = 1 << 18
"""The limit for other commands than DEL and GC: a GC lists every attachment, and a DEL ends what was once accepted."""
_MAX_ARGUMENTS = 1 << 14  # characters of CNI_ARGS

_KEPT = 256
_KEPT_BYTES = 4096
"""How many parsed configs a long-lived process keeps, and the largest one that it keeps."""

VALID_ATTACHMENTS = "cni.dev/valid-attachments"

KNOWN_ARGS = (
    "IgnoreUnknown",
    "MAC",
    "K8S_POD_NAMESPACE",
    "K8S_POD_NAME",
    "K8S_POD_INFRA_CONTAINER_ID",
    "K8S_POD_UID",
    "IP",  # IP and GATEWAY are for the IPAM delegates host-local and static
    "GATEWAY",
)

_CLEANING = {"DEL": (), "GC": ("name", VALID_ATTACHMENTS)}
"""Commands that accept an invalid configuration, each with the keys that must be valid all the same."""


@dataclass(frozen=True)
class Vlan:
    """A VLAN tag: id, priority (802.1p), and the protocol whose tag it is, "802.1Q" or "802.1ad"."""

    id: int
    priority: int = 0
    protocol: str = "802.1Q"

    @property
    def ethertype(self) -> int:
        """The tag's ethertype."""
        return 0x88A8 if self.protocol == "802.1ad" else 0x8100


@dataclass(frozen=True)
class NetConf:
    """A valid network configuration. None: not given, and the schema has no default."""

    cni_version: str
    name: str
    """"" on DEL if the configuration has none that a network can have."""
    type: str
    interface: str | None
    source: str | None
    device: str | None
    mode: str | None
    """"vepa", "pepa" or "bridge"."""
    mac: str | None
    """From runtimeConfig, CNI_ARGS or the configuration, lower case, unicast. None on DEL and GC."""
    mac_is_final: bool
    """Whether mac goes before the MAC of CNI_ARGS."""
    mtu: int | None
    queues: int
    promisc: bool
    allmulti: bool
    bcqueuelen: int | None
    owner: int | None
    group: int | None
    addressing: str
    handover: bool
    vlan: Vlan | None
    ipam: Mapping[str, Any] | None
    """None also if it has no type: then there is no delegate."""
    dns: Mapping[str, Any] | None
    prev_result: Mapping[str, Any] | None
    """As it came, not yet checked by result.parse."""
    device_id: str | None
    valid_attachments: frozenset[tuple[str, str]] | None
    """(container id, ifname) of each. None (key absent or null) is not the same as none being valid."""
    port: Mapping[str, Any] | None
    """What config/port.py reads; None also on DEL and GC."""
    bandwidth: Mapping[str, Any] | None
    """runtimeConfig.bandwidth; None also on DEL and GC."""
    raw: Mapping[str, Any]
    """The decoded document as it came. An IPAM delegate gets it."""

    @property
    def device_index(self) -> int:
        """The interface index that device_id stands for; 0 without a device_id of vmtap's form."""
        return deviceid.index_of(self.device_id)


_PLAIN = (
    *("interface", "source", "device", "mtu", "queues", "allmulti", "bcqueuelen", "owner", "group"),
    *("addressing", "handover", "dns"),
)
"""Fields of NetConf that are the config's field of that name, or its default: a new one is added here."""


@dataclass(frozen=True)
class Document:
    """The bytes of a network config, decoded when first needed and only once. command: the request's CNI_COMMAND."""

    text: bytes
    command: str = "ADD"

    def decoded(self) -> dict[str, Any]:
        """The JSON object. Raises CniError 6 if it cannot be decoded, or is larger than the command allows."""
        if isinstance(self._outcome, CniError):
            raise CniError(self._outcome.code, self._outcome.msg)  # a traceback would keep this document
        return self._outcome

    @property
    def object(self) -> dict[str, Any] | None:
        """decoded(); None if it raises."""
        return None if isinstance(self._outcome, CniError) else self._outcome

    @property
    def version(self) -> str | None:
        """The cniVersion, which an answer echoes, known to vmtap or not; None if it cannot be read."""
        version = self.object and self.object.get("cniVersion")
        return version if isinstance(version, str) else None

    @cached_property
    def _outcome(self) -> dict[str, Any] | CniError:
        try:
            return decode(self.text, MAX_BYTES if self.command in _CLEANING else COMMAND_BYTES)
        except CniError as error:
            return CniError(error.code, error.msg)


def parse(stdin: bytes, *, command: str = "ADD", called_as: str = "vmtap") -> NetConf:
    """read() of the bytes."""
    return read(Document(stdin, command), called_as)


def read(document: Document, called_as: str = "vmtap") -> NetConf:
    """The configuration of one request. called_as: the name of the executable.

    Raises CniError 1 (version), 2 (an unknown key), 6 (no JSON object that can be decoded) or 7 (a value that is not
    allowed). DEL raises none: what cannot be read or is not allowed counts as absent, as a pod must not stay because
    of it. GC does so too, but for what cannot be decoded, the version, the network's name and the list.
    """
    kept = document.command == "ADD" and len(document.text) <= _KEPT_BYTES
    return (_read_again if kept else _read)(document, called_as)


def arguments(text: str, *, command: str = "ADD") -> dict[str, str]:
    """CNI_ARGS of the form K=V;K=V. Of a key that is repeated, as Multus does, the last one counts (as in libcni).

    Raises CniError 4 if it has another form or unknown keys. For DEL and GC, what cannot be read is left out.
    """
    strict = command not in _CLEANING
    found: dict[str, str] = {}
    if len(text) > _MAX_ARGUMENTS:
        if not strict:
            return found
        raise CniError(spec.INVALID_ENVIRONMENT, f"CNI_ARGS is longer than {_MAX_ARGUMENTS} characters")
    if strict and not printable(text):
        raise CniError(
            spec.INVALID_ENVIRONMENT, f"CNI_ARGS: {schema.show(text)} is not allowed; give printable UTF-8"
        )
    for pair in text.split(";") if text else ():
        key, equals, value = pair.partition("=")
        if key and equals:
            found[key] = value
        elif strict:
            message = (
                f"CNI_ARGS: {schema.show(pair)} is not allowed; give KEY=VALUE pairs with ';' between them"
            )
            raise CniError(spec.INVALID_ENVIRONMENT, message)
    if strict:
        ignore = found.get("IgnoreUnknown", "0").lower()
        if ignore not in ("0", "1", "false", "true"):
            message = (
                f"CNI_ARGS: IgnoreUnknown={schema.show(ignore)} is not allowed; give 1, true, 0 or false"
            )
            raise CniError(spec.INVALID_ENVIRONMENT, message)
        unknown = [key for key in found if key not in KNOWN_ARGS]
        if unknown and ignore in ("0", "false"):
            hint = schema.nearest(unknown[0], list(KNOWN_ARGS))
            message = f"CNI_ARGS: unknown key {schema.show(unknown[0])}; {hint} IgnoreUnknown=1 lets it pass"
            raise CniError(spec.INVALID_ENVIRONMENT, message)
    return found


def with_arguments(conf: NetConf, arguments: Mapping[str, str]) -> NetConf:
    """conf with the MAC of CNI_ARGS, which goes before mac and after runtimeConfig.mac. Raises CniError 4."""
    mac = arguments.get("MAC")
    if not mac or conf.mac_is_final:
        return conf
    return replace(conf, mac=_unicast("CNI_ARGS: MAC", mac, spec.INVALID_ENVIRONMENT))


def _read(document: Document, called_as: str) -> NetConf:
    command = document.command
    try:
        raw = document.decoded()
        version = _version(raw)
    except CniError:
        if command != "DEL":
            raise
        raw, version = document.object or {}, spec.VERSIONS[-1]
    rules = _rules(called_as)
    fields = raw
    if not schema.accepts(rules, fields):
        fields = schema.given(rules, raw, zero=True)
        if command in _CLEANING:
            known = rules["properties"]
            fields = {
                key: value
                for key, value in fields.items()
                if key in _CLEANING[command] or (key in known and schema.accepts(known[key], value))
            }
        if command == "DEL" and "name" not in fields:
            # The IPAM plugin cannot read it, either, and would take the name for a folder's.
            fields = {"name": ""}
        elif not schema.accepts(rules, fields):
            # SPEC section 5: code 2 is for a field that the plugin does not support.
            schema.explain(rules, fields, unknown=spec.UNSUPPORTED_FIELD, foreign=_foreign())
    # A field of type integer may be written as 1500.0.
    fields = {
        key: int(value) if type(value) is float and value.is_integer() else value
        for key, value in (schema.defaults(rules) | fields).items()
    }
    runtime = _declared(fields)
    attachments = fields.get(VALID_ATTACHMENTS)
    mac = port = bandwidth = None
    if command not in _CLEANING:
        port, bandwidth = fields.get("port"), runtime.get("bandwidth")
        mac = _mac("runtimeConfig.mac", runtime) or _mac("mac", fields)
    plain: dict[str, Any] = {name: fields.get(name) for name in _PLAIN}
    return NetConf(
        cni_version=version,
        name=fields["name"],
        type=fields.get("type", called_as),
        mode=canonical(fields["mode"]) if "mode" in fields else None,
        mac=mac,
        mac_is_final=bool(runtime.get("mac")) or command in _CLEANING,
        promisc=fields["promisc"] or fields.get("promiscMode", False),
        vlan=_vlan(fields),
        ipam=delegation.ipam(fields, strict=command not in _CLEANING),
        prev_result=fields.get("prevResult"),
        device_id=runtime.get("deviceID") or fields.get("deviceID"),
        valid_attachments=attachments
        if attachments is None
        else frozenset((each["containerID"], each["ifname"]) for each in attachments),
        port=port,
        bandwidth=bandwidth,
        raw=raw,
        **plain,
    )


_read_again = lru_cache(maxsize=_KEPT)(_read)
"""Caches parsed network configs by their bytes, because thousands of ADDs on a node have few different ones."""


def canonical(mode: str) -> str:
    """The mode's name in vmtap: pepa for the kernel's private."""
    return "pepa" if mode == "private" else mode


@cache
def _rules(called_as: str) -> dict[str, Any]:
    rules = schema.load("netconf")
    if called_as != "macvtap":
        return rules
    return rules | {"properties": rules["properties"] | rules["$defs"]["macvtap"]["properties"]}


def _foreign() -> dict[str, str]:
    from cni.config import foreign  # noqa: PLC0415 - only an invalid config needs it

    return foreign.NETCONF


def _version(document: dict[str, Any]) -> str:
    version = document.get("cniVersion")
    if version in (None, ""):
        return "0.1.0"  # SPEC: a config without cniVersion is of the first version
    if not isinstance(version, str):
        # SPEC section 5: code 6 includes "failed to decode version info".
        raise CniError(
            spec.DECODING_FAILURE, f"cniVersion: {schema.show(version)} is not allowed; give a string"
        )
    if version not in spec.VERSIONS:
        supported = ", ".join(spec.VERSIONS)
        raise CniError(
            spec.INCOMPATIBLE_VERSION,
            f"cniVersion: {schema.show(version)} is not supported; give one of {supported}",
        )
    return version


def _declared(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of runtimeConfig that count.

    By SPEC section 3 a runtime filters runtimeConfig by capabilities and leaves out capabilities. libcni filters and
    keeps capabilities. So a config with capabilities is filtered here again; in one without, every field counts.
    """
    runtime: dict[str, Any] = fields.get("runtimeConfig") or {}
    capabilities = fields.get("capabilities")
    if capabilities is None:
        return runtime
    return {key: value for key, value in runtime.items() if capabilities.get(key)}


def _vlan(fields: dict[str, Any]) -> Vlan | None:
    """The VLAN; None without one, also for DEL and GC if a part of it is invalid."""
    if "vlan" in fields:
        return Vlan(fields["vlan"], fields["vlanPriority"], fields["vlanProtocol"])
    return None


def _mac(where: str, fields: dict[str, Any]) -> str | None:
    mac = fields.get("mac")
    return _unicast(where, mac, spec.INVALID_NETWORK_CONFIG) if mac else None


def _unicast(where: str, mac: str, code: int) -> str:
    rule = schema.load("netconf")["properties"]["mac"]
    found, fault = "", ""
    if not schema.accepts(rule, mac):
        fault = "is not allowed"
    elif int((found := with_colons(mac))[:2], 16) & 1:
        fault = "is a multicast address"
    elif found == "00:00:00:00:00:00":
        fault = "is no address"
    if fault:
        raise CniError(code, f"{where}: {schema.show(mac)} {fault}; give {schema.allowed(rule)}")
    return found
