"""Checks network configs, policies, agent's files and the manifests that have them, before a node uses them.

Applies what the plugin applies, but for who owns the file: in a checkout that is its author. Must not look at this
node.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from cni.attach import result
from cni.config import claim, decoding, netconf, nodefile, policy, schema
from cni.ctl import manifests
from cni.errors import CniError, reason
from cni.spec import INVALID_NETWORK_CONFIG
from cni.state import deviceid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import Any

    from cni.config.policy import Policy

TYPES = ("vmtap", "macvtap")
_NETWORK, _POLICY, _AGENT, _MANIFEST = "network config", "policy", "agent's file", "manifest"
_SCHEMAS = {_AGENT: "agent", _POLICY: "policy"}
_OF_A_NETWORK = {"type", "plugins", "cniVersion", "cniVersions"}
_DEPTH, _EVENTS = 64, 400_000
"""The most levels and YAML events of a manifest: kubectl prints managedFields, too."""
_NEXT = re.compile(r"; (?=[^ ;]+: )")
"""Separates the faults in an error's details (schema.explain); each begins with the path of its field."""


@dataclass(frozen=True)
class Verdict:
    """faults: one line each, none if the file is good. kind: "network config", "policy", "agent's file", "manifest"."""

    file: str
    kind: str
    faults: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {"file": self.file, "kind": self.kind, "ok": not self.faults, "faults": list(self.faults)}


def check(file: str, rules: Policy | None = None) -> Verdict:
    """What is wrong with the file, whose content shows its kind. rules: the policy that is to allow the networks."""
    try:
        with open(file, "rb") as opened:
            text = opened.read(nodefile.MAX_BYTES + 1)
    except OSError as error:
        return Verdict(file, "file", (reason(error).removesuffix(f": {file}"),))
    kind = "file"
    faults: list[str] = []
    try:
        if len(text) > nodefile.MAX_BYTES:
            raise _fault(f"it is larger than {nodefile.MAX_BYTES} bytes; make it smaller")
        kind, documents = _read(file, text)
        if kind == _MANIFEST:
            faults = list(_manifest(documents, rules))
        else:
            _as(kind, file, text, rules)
    except CniError as error:
        faults = _faults(file, error)
    return Verdict(file, kind, tuple(faults))


def read_policy(file: str) -> Policy:
    """The policy in a file, whoever owns it. Raises CniError 7, OSError."""
    with open(file, "rb") as opened:
        return policy.of(file, nodefile.parse(file, opened.read(), schema.load("policy")))


def _read(name: str, text: bytes) -> tuple[str, list[Any]]:
    """The kind of the text, and its documents. Raises CniError if it can be decoded as no kind."""
    if text.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
        documents = nodefile.documents(name, text, depth=_DEPTH, events=_EVENTS)
        return _kind(documents, default=_POLICY), documents
    try:
        documents = [decoding.decode(text, nodefile.MAX_BYTES)]
    except CniError:
        # YAML may be in braces, too.
        try:
            documents = nodefile.documents(name, text, depth=_DEPTH, events=_EVENTS)
        except CniError:
            return _NETWORK, []
    return _kind(documents, default=_NETWORK), documents


def _kind(documents: list[Any], default: str) -> str:
    first = next((each for each in documents if isinstance(each, dict)), {})
    if any(map(manifests.is_one, documents)):
        return _MANIFEST
    if default == _NETWORK and first.keys() & _OF_A_NETWORK:
        return _NETWORK
    return next((kind for kind in _SCHEMAS if first.keys() & _known(kind)), default)


def _known(kind: str) -> Collection[str]:
    keys: Collection[str] = schema.load(_SCHEMAS[kind])["properties"].keys()
    return keys


def _as(kind: str, name: str, text: bytes, rules: Policy | None, part: manifests.Part | None = None) -> None:
    """Check the text as one of that kind. Raises CniError."""
    if kind == _NETWORK:
        _network(text, rules, part)
        return
    document = nodefile.parse(name, text, schema.load(_SCHEMAS[kind]))
    if kind == _POLICY:
        policy.of(name, document)


def _network(text: bytes, rules: Policy | None, part: manifests.Part | None) -> None:
    document = decoding.decode(text, nodefile.MAX_BYTES)
    if part and document.get("name", "") == "":  # as Multus does
        document["name"] = part.network
    ours = list(_ours(document))
    if not ours:
        raise _fault(f"no plugin in it is of type {' or '.join(TYPES)}")
    for first, plugin in ours:
        whole = plugin is document and not part
        config = text if whole else json.dumps(plugin, ensure_ascii=False, separators=(",", ":")).encode()
        conf = netconf.parse(config, called_as=plugin["type"])
        if first:
            result.require_address(conf)
        if part and part.resource and policy.left_to_kubelet(conf):
            device = deviceid.format(part.resource.rpartition("/")[2], 0)
            conf = netconf.parse(json.dumps(plugin | {"deviceID": device}).encode(), called_as=plugin["type"])
        if policy.left_to_kubelet(conf):
            raise _fault(
                "interface: is missing; give interface, source or device tap, or have Multus pass on the kubelet's "
                f"device, by the annotation {manifests.RESOURCE} of a NetworkAttachmentDefinition"
            )
        if rules or not (conf.interface or conf.device_id):
            policy.authorize(rules, conf)


def _ours(document: dict[str, Any]) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Each config of a type of ours as a runtime passes it, and whether no other plugin comes before it.

    Those of a list get the list's name and version.
    """
    if "plugins" not in document:
        plugins = [document]
    elif isinstance(document["plugins"], list):
        shared = {key: document[key] for key in ("name", "cniVersion", "cniVersions") if key in document}
        plugins = [plugin | shared for plugin in document["plugins"] if isinstance(plugin, dict)]
    else:
        raise _fault(f"plugins: {schema.show(document['plugins'])} is not allowed; give a list")
    yield from ((plugin is plugins[0], plugin) for plugin in plugins if plugin.get("type") in TYPES)


def _manifest(documents: list[Any], rules: Policy | None) -> Iterator[str]:
    """The faults of what is vmtap's in the objects; that nothing is, is one."""
    ours = 0
    for document in (each for one in filter(manifests.is_one, documents) for each in manifests.objects(one)):
        for where, parameters in manifests.parameters(document):
            ours += 1
            try:
                claim.check(parameters)
            except CniError as error:
                for each in _faults(where, error):
                    yield f"{where}: {each}"
        for part in manifests.parts(document):
            try:
                if not isinstance(part.text, str):
                    raise _fault(f"{schema.show(part.text)} is not allowed; give a string")
                text = part.text.encode(errors="surrogatepass")
                kind = _kind_of(part, text)
                if kind:
                    ours += 1
                    _as(kind, part.where, text, rules, part if part.network is not None else None)
            except CniError as error:
                ours += 1
                for each in _faults(part.where, error):
                    yield f"{part.where}: {each}"
    if not ours:
        yield (
            f"no network in it is of type {' or '.join(TYPES)}, no ConfigMap has a file of vmtap, and no claim or "
            f"class has parameters for {claim.DRIVER}"
        )


def _kind_of(part: manifests.Part, text: bytes) -> str | None:
    """The kind of a manifest's part; None if it is none of vmtap's. Raises CniError if it cannot be decoded."""
    about_us = any(each in part.text for each in TYPES)
    try:
        kind, documents = _read(part.where, text)
    except CniError:
        if about_us:
            raise
        return None
    if part.network is not None or kind == _NETWORK:
        return _NETWORK if about_us else None
    ours = kind in _SCHEMAS and any(
        isinstance(each, dict) and each.keys() & _known(kind) for each in documents
    )
    return kind if ours else None


def _faults(name: str, error: CniError) -> list[str]:
    first = error.msg.removeprefix(f"{name}: ").removeprefix(f"{name}, ")
    return [first, *filter(None, _NEXT.split(error.details))]


def _fault(text: str) -> CniError:
    return CniError(INVALID_NETWORK_CONFIG, text)
