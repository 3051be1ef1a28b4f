"""A stand-in for the API server, in memory: claims, slices, and what it was sent."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from cni.agent.dra.api import RESOURCE, Answer, Api

if TYPE_CHECKING:
    from collections.abc import Mapping

SLICES = f"{RESOURCE}/resourceslices"


class StandIn(Api):
    """Answers calls. claims: by "NAMESPACE/NAME"; drops: fields of devices that it does not store."""

    def __init__(self) -> None:
        super().__init__("unused", 0)
        self.claims: dict[str, dict[str, Any]] = {}
        self.slices: dict[str, dict[str, Any]] = {}
        self.drops: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.bodies: list[Mapping[str, Any]] = []
        self.status = 200
        """The status of the next answers to what changes something."""

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        kind: str = "",
        query: Mapping[str, str] | None = None,
    ) -> Answer:
        self.calls.append((method, path))
        if body is not None:
            self.bodies.append(copy.deepcopy(body))
        if method != "GET" and self.status != 200:
            return Answer(self.status, {"message": "not today"})
        last = path.rpartition("/")[2]
        if path.startswith("/api/v1/nodes/"):
            return Answer(200, {"metadata": {"uid": f"uid of {last}"}})
        if "/resourceclaims/" in path:
            _, _, rest = path.partition("/namespaces/")
            found = self.claims.get(rest.replace("/resourceclaims", "").removesuffix("/status"))
            return Answer(200, copy.deepcopy(found)) if found else Answer(404, {"message": "not found"})
        return self._slice(method, path, last, body, dry="dryRun" in (query or {}))

    def _slice(
        self, method: str, path: str, name: str, body: Mapping[str, Any] | None, *, dry: bool
    ) -> Answer:
        assert path.startswith(SLICES)
        if method == "GET":
            return Answer(200, {"items": copy.deepcopy([*self.slices.values()])})
        if method == "DELETE":
            return Answer(200 if self.slices.pop(name, None) else 404, {})
        stored: dict[str, Any] = copy.deepcopy(dict(body or {}))
        stored["metadata"]["resourceVersion"] = str(len(self.calls))
        for device in stored["spec"]["devices"]:
            for field in self.drops & device.keys():
                del device[field]
        if not dry:
            self.slices[stored["metadata"]["name"]] = stored
        return Answer(200, copy.deepcopy(stored))
