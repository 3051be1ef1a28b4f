"""A ResourceClaim as the API server has it, a pod's annotation → config/claim.py; the file of a prepared claim →
state/claims.py.

What the API server lets a user write is less than what is tried here.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from cni.config import claim, netconf, policy, schema
from cni.errors import CniError
from cni.names import is_ifname
from cni.state import claims as files
from lab.fuzz import claims
from lab.fuzz.targets import Target, keys

_POLICY = policy.of(
    "policy", {"interfaces": [{"name": "dataplane", "source": {"dev": "eth1"}, "capacity": 4}]}
)


def run(data: bytes) -> None:
    """Decode data as all three."""
    _file(data)
    _annotation(data)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(document, dict):
        return
    try:
        claim.pod_of(document)
    except CniError as error:
        claims.refused(error, (7,))
    try:
        found = claim.allocated(document)
    except CniError as error:
        claims.refused(error, (2, 7))
        return
    names = [each.ifname for each in found]
    assert len({*names}) == len(names)
    assert all(map(is_ifname, names))
    for each in found:
        assert not each.fields.keys() - {*claim.SHARED}
        _granted(each)


def _annotation(data: bytes) -> None:
    try:
        found = claim.macs(data.decode(errors="replace"), "net")
    except CniError as error:
        claims.refused(error, (7,))
        return
    assert all(isinstance(mac, str) for each in found.values() for mac in each)


def _granted(device: claim.Allocated) -> None:
    try:
        entry, number = claim.interface_of(_POLICY, device.device)
        assert claim.device_name(entry.name, number) == device.device
        conf = claim.parse(claim.network_config(device, entry))
        grant = policy.authorize(_POLICY, conf)
    except CniError as error:
        claims.refused(error, (2, 6, 7))
        return
    assert (grant.interface, grant.source, grant.device) == ("dataplane", "eth1", "macvtap")
    assert netconf.parse(json.dumps(conf.raw).encode()) == conf


def _file(data: bytes) -> None:
    try:
        uid = str(json.loads(data)["uid"])
    except (ValueError, TypeError, LookupError, RecursionError):
        uid = "none"
    try:
        found = files.decode(uid, data)
    except ValueError:
        return
    assert found.uid == uid
    for each in found.devices:
        claims.typed(each)
        assert found.attachment(each)
    assert files.decode(uid, json.dumps(asdict(found)).encode()) == found


_WORDS = ("claimName", "requestName", "macs")
TARGET = Target(run, words=(*keys(schema.load("claim"), schema.load("netconf")), *_WORDS), json=True)
