"""The node's policy file, and other files of an administrator: bytes → nodefile.parse → policy.of → authorize."""

from __future__ import annotations

import json

import yaml

from cni import spec
from cni.config import netconf, nodefile, policy, schema
from cni.errors import CniError
from lab.fuzz import claims
from lab.fuzz.targets import Target, keys

_RULES = schema.load("policy")
_ASKED = [
    netconf.parse(json.dumps({"cniVersion": "1.1.0", "name": "n", "type": "vmtap", **fields}).encode())
    for fields in (
        {"source": "eth1"},
        {"interface": "dataplane"},
        {"interface": "dataplane", "mode": "pepa", "vlan": 7, "device": "tap"},
        {"deviceID": "dataplaneMvp3", "mode": "vepa"},
    )
]


def run(data: bytes) -> None:
    """Parse data as a policy file; ask the policy for a few network configs."""
    try:
        document = nodefile.parse("policy", data, _RULES)
        rules = policy.of("policy", document)
    except CniError as error:
        claims.refused(error, (spec.INVALID_NETWORK_CONFIG,))
        return
    claims.typed(rules)
    names = [entry.name for entry in rules.interfaces]
    assert len(names) == len({*names})
    for entry in rules.interfaces:
        claims.typed(entry)
        for text in (entry.name, *entry.sources):
            claims.printable(text)
            assert text
        assert entry.dev == entry.sources[0]
        assert entry.modes is None or (entry.modes and {*entry.modes} <= {*policy.MODES})
        assert entry.vlans is None or all(1 <= vlan <= 4094 for vlan in entry.vlans)
        assert entry.devices >= 1
    again = nodefile.parse("policy", yaml.safe_dump(document).encode(), _RULES)
    assert policy.of("policy", again) == rules
    for conf in _ASKED:
        _ask(rules, conf)


def _ask(rules: policy.Policy, conf: netconf.NetConf) -> None:
    try:
        grant = policy.authorize(rules, conf)
    except CniError as error:
        claims.refused(error, (spec.INVALID_NETWORK_CONFIG,))
        return
    entries = [entry for entry in rules.interfaces if entry.name == grant.interface]
    if not entries:
        assert rules.allow_unlisted
        assert not any(conf.source in entry.sources for entry in rules.interfaces)
        return
    (entry,) = entries
    assert {*grant.sources} <= {*entry.sources}
    assert entry.modes is None or grant.mode in entry.modes
    assert entry.vlans is None or (grant.vlan and grant.vlan.id in entry.vlans)
    assert entry.handover or not grant.handover


TARGET = Target(run, words=(*keys(_RULES), "\n- ", ": ", "&a", "*a", "!!", "---\n"), json=True)
