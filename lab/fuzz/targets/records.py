"""The file of an attachment in the state folder: record.decode, of what another version wrote or a disk has damaged."""

from __future__ import annotations

import json

from cni.kernel.vf_settings import VfSettings
from cni.state import record
from lab.fuzz import claims
from lab.fuzz.targets import Target


def run(data: bytes) -> None:
    """Decode data as the record of the attachment that it names: each field has its type, and encode() is inverse."""
    id = _id(data)
    try:
        decoded = record.decode(id, data)
    except ValueError:
        return
    assert decoded.id == id
    claims.typed(decoded)
    if decoded.vlan:
        claims.typed(decoded.vlan)
    if decoded.vf:
        for each in (decoded.vf, decoded.vf.link, decoded.vf.before, decoded.vf.made):
            claims.typed(each)
    encoded = record.encode(decoded)
    assert record.encode(record.decode(id, encoded)) == encoded
    parsed = record.parse_alias(decoded.alias)
    assert parsed in (None, (decoded.network, decoded.container_id, decoded.ifname)) or "/" in "".join(parsed)


def _id(data: bytes) -> str:
    """The name that the file would have."""
    try:
        document = json.loads(data)
        return record.identifier(document["network"], document["container_id"], document["ifname"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return "none"


_WORDS = tuple(
    sorted(
        name
        for kind in (record.Record, record.VlanDevice, record.VirtualFunction, record.VfLink, VfSettings)
        for name in kind.__dataclass_fields__
    )
)
TARGET = Target(run, words=_WORDS, json=True)
