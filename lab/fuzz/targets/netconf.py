"""The network config of one request: bytes on stdin → netconf.parse, the schema, and what a policy grants to it."""

from __future__ import annotations

import json

from jsonschema import Draft202012Validator

from cni import spec
from cni.config import netconf, policy, schema
from cni.errors import CniError
from lab.fuzz import claims
from lab.fuzz.targets import Target, keys

_RULES = schema.load("netconf")
_VALID = Draft202012Validator(_RULES)
_POLICY = policy.of(
    "policy",
    {
        "interfaces": [
            {"name": "dataplane", "source": {"dev": "eth1"}, "modes": ["vepa", "bridge"], "vlans": [7, 8]},
            {"name": "fast", "type": "sr-iov", "source": {"dev": ["ens1", "ens2"]}, "vfs": 4},
            {"name": "br", "source": {"dev": "br0"}, "capacity": 3},
        ]
    },
)


def run(data: bytes) -> None:
    """Parse data as ADD, DEL and GC do; ask two policies for what it asks for."""
    called_as = "macvtap" if b'"macvtap"' in data else "vmtap"
    conf = None
    try:
        conf = netconf.parse(data, called_as=called_as)
    except CniError as error:
        claims.refused(error, (1, 2, 6, 7))
    ended = netconf.parse(data, command="DEL", called_as=called_as)
    assert ended.mac is None
    assert ended.name or conf is None, "what an ADD has accepted is refused later"
    if ended.name:
        _accepted(ended)
    try:
        cleaned = netconf.parse(data, command="GC", called_as=called_as)
    except CniError as error:
        claims.refused(error, (1, 6, 7))
        assert conf is None, "what an ADD has accepted is refused later"
    else:
        assert cleaned.mac is None
        _accepted(cleaned)
    if conf:
        _accepted(conf)
        if called_as == "vmtap":
            given = schema.given(_RULES, conf.raw, zero=True)
            assert _VALID.is_valid(conf.raw) or _VALID.is_valid(given), "accepts() is not sound"
        assert netconf.parse(json.dumps(conf.raw).encode(), called_as=called_as) == conf
        for rules in (None, _POLICY):
            _asked_of(rules, conf)


def _accepted(conf: netconf.NetConf) -> None:
    claims.typed(conf)
    assert conf.cni_version in spec.VERSIONS
    assert conf.name
    for text in (conf.name, conf.interface, conf.source, conf.device_id):
        claims.printable(text)
    assert conf.mode in (None, *policy.MODES)
    assert conf.device in (None, "macvtap", "tap")
    if conf.mac:
        claims.unicast(conf.mac)
    assert conf.mtu is None or 68 <= conf.mtu <= 65535
    assert 1 <= conf.queues <= 256
    assert conf.vlan is None or (1 <= conf.vlan.id <= 4094 and 0 <= conf.vlan.priority <= 7)
    for number in (conf.owner, conf.group, conf.bcqueuelen):
        assert number is None or 0 <= number < 2**32
    json.dumps(conf.raw, allow_nan=False, ensure_ascii=False).encode()


def _asked_of(rules: policy.Policy | None, conf: netconf.NetConf) -> None:
    try:
        grant = policy.authorize(rules, conf)
    except CniError as error:
        claims.refused(error, (spec.INVALID_NETWORK_CONFIG,))
        return
    if rules and grant.source:
        entry = next(each for each in rules.interfaces if each.name == grant.interface)
        assert {*grant.sources} <= {*entry.sources}
        assert entry.modes is None or grant.mode in entry.modes
        assert entry.vlans is None or (grant.vlan and grant.vlan.id in entry.vlans)
        assert conf.device_index == 0 or grant.device == "macvtap"


TARGET = Target(run, words=(*keys(_RULES), "K8S_POD_NAME", "dataplaneMvp0", "fastMvp3", "br0"), json=True)
