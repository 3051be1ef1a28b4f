"""Keeps the node's ResourceSlices in the API server as they should be.

The pool has the node's name. Its slices have one generation, which grows with each change: a scheduler uses a pool only
when all its slices have the highest. Somebody else may remove or change them at any time; a kubelet does so at its
start. So the caller has them compared from time to time.

An API server without a feature drops its fields silently. What it has stored is compared with what it stored before,
and never with what was sent: else each comparison would write again.
"""

from __future__ import annotations

from hashlib import blake2s
from http import HTTPStatus
from logging import INFO, WARNING

from cni.agent.dra.api import RESOURCE, segment
from cni.agent.dra.slices import SEVERAL, chunks
from cni.agent.log import log
from cni.config.claim import DRIVER
from cni.dataclass import dataclass
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cni.agent.dra.api import Api

_PATH = f"{RESOURCE}/resourceslices"
_KIND = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice"}
_NAME = 200
"""Characters of the node's name in a slice's: together at most 253."""


@dataclass(frozen=True)
class _Written:
    """What was sent of a slice's spec, and what the server made of it."""

    sent: list[dict[str, Any]]
    stored: list[dict[str, Any]]


class Publishing:
    """The slices of one node. For one thread."""

    def __init__(self, api: Api, node: str) -> None:
        self._api, self._node = api, node
        self.shares = False
        """Whether the API server stores that a device may have several allocations, as far as is known."""
        self._written: dict[str, _Written] = {}
        self._dropped: set[str] = set()

    def ask(self) -> None:
        """Find out shares: a dry run returns the slice as it would be stored, and stores nothing. Raises CniError."""
        document = {
            **_KIND,
            "metadata": {"name": self._name("probe")},
            "spec": {
                "driver": DRIVER,
                "nodeName": self._node,
                "pool": {"name": self._node, "generation": 1, "resourceSliceCount": 1},
                "devices": [{"name": "probe", SEVERAL: True}],
            },
        }
        answer = self._api.call("POST", _PATH, document, query={"dryRun": "All"})
        self._check(answer, "probe")
        [device] = (answer.body.get("spec") or {}).get("devices") or [{}]
        self.shares = device.get(SEVERAL) is True

    def publish(self, devices: list[dict[str, Any]]) -> bool:
        """Write the slices that are not as wanted, and remove others; whether there was one. Raises CniError."""
        selector = f"spec.driver={DRIVER},spec.nodeName={self._node}"
        there = {
            str(each["metadata"]["name"]): each for each in self._api.listed(_PATH, fieldSelector=selector)
        }
        wanted = {self._name(number): chunk for number, chunk in enumerate(chunks(devices))}
        generations = {_pool(each).get("generation", 0) for each in there.values()}
        same = there.keys() == wanted.keys() and len(generations) == 1
        if same and all(
            _pool(there[name]).get("resourceSliceCount") == len(wanted)
            and self._as_wanted(name, chunk, there[name]["spec"].get("devices") or [])
            for name, chunk in wanted.items()
        ):
            return False
        generation = max(generations, default=0) + 1
        spec = {
            "driver": DRIVER,
            "nodeName": self._node,
            "pool": {"name": self._node, "generation": generation, "resourceSliceCount": len(wanted)},
        }
        owner = self._owner()
        for name in there.keys() - wanted.keys():
            self._check(self._api.call("DELETE", f"{_PATH}/{segment(name)}"), name, HTTPStatus.NOT_FOUND)
            self._written.pop(name, None)
        for name, chunk in wanted.items():
            metadata: dict[str, Any] = {"name": name, "ownerReferences": [owner]}
            if name in there:
                metadata["resourceVersion"] = there[name]["metadata"]["resourceVersion"]
            document = {**_KIND, "metadata": metadata, "spec": spec | {"devices": chunk}}
            self._write(name, document, again=name in there)
        log(INFO, "slices published", node=self._node, devices=len(devices), generation=generation)
        return True

    def _as_wanted(self, name: str, chunk: list[dict[str, Any]], stored: list[dict[str, Any]]) -> bool:
        written = self._written.get(name)
        if stored == chunk:
            return True
        return bool(written and written.sent == chunk and written.stored == stored)

    def _write(self, name: str, document: dict[str, Any], *, again: bool) -> None:
        path = f"{_PATH}/{segment(name)}" if again else _PATH
        answer = self._api.call("PUT" if again else "POST", path, document)
        self._check(answer, name)
        sent = document["spec"]["devices"]
        stored = (answer.body.get("spec") or {}).get("devices") or []
        self._written[name] = _Written(sent, stored)
        all_dropped = _dropped(sent, stored)
        self.shares &= SEVERAL not in all_dropped
        if dropped := all_dropped - self._dropped:
            self._dropped |= dropped
            what = "the API server drops fields of devices that it does not know"
            log(WARNING, what, fields=sorted(dropped))

    def _owner(self) -> dict[str, Any]:
        """The node as an owner: the slices are removed with it. Raises CniError."""
        answer = self._api.get(f"/api/v1/nodes/{segment(self._node)}")
        if not answer.ok:
            raise answer.failed(f"node {self._node}")
        uid = str(answer.body["metadata"]["uid"])
        return {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": uid}

    def _check(self, answer: Any, name: str, *also: int) -> None:
        if not answer.ok and answer.status not in also:
            failed: CniError = answer.failed(f"ResourceSlice {name}")
            raise failed

    def _name(self, number: int | str) -> str:
        node = self._node
        if len(node) > _NAME:
            node = f"{node[:_NAME].rstrip('-.')}-{blake2s(node.encode(), digest_size=4).hexdigest()}"
        return f"{node}-{DRIVER}-{number}"


def _pool(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"].get("pool") or {}
    return found


def _dropped(sent: list[dict[str, Any]], stored: list[dict[str, Any]]) -> set[str]:
    """The names of the fields of devices that were sent and are not stored."""
    by_name = {each.get("name"): each for each in stored}
    return {key for each in sent for key in each if key not in by_name.get(each["name"], dict.fromkeys(each))}
