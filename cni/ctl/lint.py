"""Checks network configs, policies and agent's files before a node uses them.

Applies what the plugin applies, but for who owns the file: in a checkout that is its author. Must not look at this
node.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from cni.config import netconf, nodefile, policy, schema
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from cni.config.policy import Policy

TYPES = ("vmtap", "macvtap")
_NEXT = re.compile(r"; (?=[^ ;]+: )")
"""Separates the faults in an error's details (schema.explain); each begins with the path of its field."""


@dataclass(frozen=True)
class Verdict:
    """faults: one line each, none if the file is good. kind: "network config", "policy", "agent's file"."""

    file: str
    kind: str
    faults: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        return {"file": self.file, "kind": self.kind, "ok": not self.faults, "faults": list(self.faults)}


def check(file: str, rules: Policy | None = None) -> Verdict:
    """A file that begins with "{" is a network config. rules: the policy that it is to be allowed by, if given."""
    kind = "file"
    try:
        with open(file, "rb") as opened:
            text = opened.read(nodefile.MAX_BYTES + 1)
        if text.lstrip()[:1] == b"{":
            kind = "network config"
            _network(text, rules)
        else:
            kind = _node(file, text)
    except CniError as error:
        first = error.msg.removeprefix(f"{file}: ").removeprefix(f"{file}, ")
        return Verdict(file, kind, (first, *filter(None, _NEXT.split(error.details))))
    except (OSError, ValueError, RecursionError) as error:
        return Verdict(file, kind, (reason(error),))
    return Verdict(file, kind)


def read_policy(file: str) -> Policy:
    """The policy in a file, whoever owns it. Raises CniError 7, OSError."""
    with open(file, "rb") as opened:
        return policy.of(file, nodefile.parse(file, opened.read(), schema.load("policy")))


def _network(text: bytes, rules: Policy | None) -> None:
    document = json.loads(text)
    ours = list(_ours(document))
    if not ours:
        raise ValueError(f"no plugin in it is of type {' or '.join(TYPES)}")
    for plugin in ours:
        conf = netconf.parse(json.dumps(plugin).encode(), called_as=plugin["type"])
        if rules:
            policy.authorize(rules, conf)


def _ours(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configs as a runtime passes them: those of a list get the list's name and version."""
    if "plugins" not in document:
        plugins = [document]
    else:
        shared = {key: document[key] for key in ("name", "cniVersion", "cniVersions") if key in document}
        plugins = [plugin | shared for plugin in document["plugins"] if isinstance(plugin, dict)]
    yield from (plugin for plugin in plugins if plugin.get("type") in TYPES)


def _node(file: str, text: bytes) -> str:
    """The kind of the file, which its keys show. Raises CniError."""
    document = nodefile.parse(file, text, {"type": ["object", "null"]})
    if document.keys() & schema.load("agent")["properties"].keys():
        nodefile.parse(file, text, schema.load("agent"))
        return "agent's file"
    policy.of(file, nodefile.parse(file, text, schema.load("policy")))
    return "policy"
