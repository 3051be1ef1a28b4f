"""Reports what an attach has made in the status of the claim, by server-side apply.

The attach must not wait for the API server: the reports are queued, and one thread sends them. A report that fails is
sent again, until the claim is prepared no more.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from http import HTTPStatus
from logging import INFO, WARNING

from cni.agent.dra.api import APPLY, RESOURCE, segment
from cni.agent.dra.metadata import network_data
from cni.agent.log import log
from cni.config.claim import DRIVER
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from cni.agent.dra.api import Api
    from cni.state.claims import Claim
    from cni.state.record import Record

_SOONEST, _LATEST = 1.0, 60.0
"""Seconds between attempts."""
_STOP_SECONDS = 5.0
_MOST = 4096
"""Claims whose report is remembered."""


class Status:
    """Works from start() to stop(). exists: whether a claim of that UID is prepared."""

    def __init__(self, api: Api, exists: Callable[[str], bool]) -> None:
        self._api, self._exists = api, exists
        self._changed = threading.Condition()
        self._waiting: dict[str, tuple[Claim, dict[str, Any]]] = {}
        """By the claim's UID: only the last report counts."""
        self._reported: dict[str, object] = {}
        """By the claim's UID: what the API server has. Each container of the pod causes a report."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dra-status", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Have the thread stop after the call of the API server that it is in; reports that wait are lost."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join(_STOP_SECONDS)

    def report(self, claim: Claim, records: Sequence[Record]) -> None:
        """Have the attached devices reported, unless they were. Does not block."""
        what = _essence(claim, records)
        with self._changed:
            if self._reported.get(claim.uid) == what:
                return
            if len(self._reported) >= _MOST:
                self._reported.clear()
            self._reported[claim.uid] = what
            self._waiting[claim.uid] = claim, _document(claim, records)
            self._changed.notify_all()

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                waiting = dict(self._waiting)
            for uid, (claim, document) in waiting.items():
                if self._stopping:
                    return
                done = not self._exists(uid) or self._send(claim, document)
                with self._changed:
                    if done and self._waiting.get(uid) == (claim, document):
                        del self._waiting[uid]
            with self._changed:
                pause = min(_LATEST, pause * 2 or _SOONEST) if self._waiting else 0.0
                self._changed.wait_for(lambda: self._stopping, pause)

    def _send(self, claim: Claim, document: dict[str, Any]) -> bool:
        path = f"{RESOURCE}/namespaces/{segment(claim.namespace)}/resourceclaims/{segment(claim.name)}/status"
        query = {"fieldManager": DRIVER, "force": "true"}
        names = {"claim": f"{claim.namespace}/{claim.name}", "uid": claim.uid}
        try:
            answer = self._api.call("PATCH", path, document, kind=APPLY, query=query)
            if answer.status in (
                HTTPStatus.NOT_FOUND,
                HTTPStatus.CONFLICT,
            ):  # another claim, or none, has the name
                return True
            if not answer.ok:
                raise answer.failed("the claim's status")
        except CniError as error:
            if self._stopping:
                return False
            log(WARNING, "the status of a claim is not reported; tried again", error=str(error), **names)
            return False
        log(INFO, "claim reported", **names)
        return True


def _essence(claim: Claim, records: Sequence[Record]) -> object:
    """What distinguishes a report from another one of the claim."""
    return claim.pod_uid, sorted(
        (record.id, record.ifname, record.mac, str(record.ips)) for record in records
    )


def _document(claim: Claim, records: Sequence[Record]) -> dict[str, Any]:
    by_id = {record.id: record for record in records}
    now = datetime.fromtimestamp(int(time.time()), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    devices = []
    for each in claim.devices:
        record = by_id.get(claim.attachment(each))
        ready = {
            "type": "Ready",
            "status": "True" if record else "False",
            "reason": "Attached" if record else "NotAttached",
            "message": f"{record.ifname} on {record.source}" if record else "",
            "lastTransitionTime": now,
        }
        devices.append(
            {
                "driver": DRIVER,
                "pool": each.pool,
                "device": each.device,
                **({"shareID": each.share} if each.share else {}),
                "conditions": [ready],
                **({"networkData": network_data(record)} if record else {}),
            }
        )
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": claim.name, "namespace": claim.namespace, "uid": claim.uid},
        "status": {"devices": devices},
    }
