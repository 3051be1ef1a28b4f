"""What doctor finds of resource claims: the driver, the hook, and what Prepare leaves. Must change nothing.

The agent's page /claims tells whether the driver runs, and what it has reached.
"""

from __future__ import annotations

import http.client
import json
import os
from contextlib import suppress
from datetime import datetime, timedelta
from http import HTTPStatus

from cni.agent.cgroups import Cgroups
from cni.ctl import agent_page, snapshot
from cni.ctl.finding import Finding
from cni.state import cdi, lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from cni.ctl.inventory import Node
    from cni.ctl.locations import Settings
    from cni.state.claims import Claim

_CHECK = "resource claims"
_LONG = timedelta(minutes=10)
"""A pod without a sandbox, or, without NRI, without a container, for so long is stuck."""


def examine(settings: Settings, node: Node) -> Iterator[Finding]:
    """Each finding; none if the driver is off and no claim is prepared. Raises CniError 5."""
    claims, unreadable = snapshot.read_claims(settings.run)
    status, state = _page(settings.health)
    if status == HTTPStatus.OK:
        yield from (Finding(_CHECK, *each) for each in _driver(state))
    elif status and (settings.dra or claims):
        yield Finding(
            _CHECK,
            "error",
            f"the agent runs without dra, and {len(claims)} claims are prepared: their containers do not start"
            if claims
            else "the agent runs without dra, which its file requests",
            "restart it with dra on",
        )
    hooks = {str(state["hook"])} if "hook" in state else set()
    attached = {each.record.id for each in node.attachments}
    groups = Cgroups(settings.cgroup)
    bad = [
        Finding(_CHECK, "warning", f"{path}: {why}", "examine and remove it")
        for path, why in unreadable.items()
    ]
    for claim, since in claims:
        path = cdi.claim_path(settings.cdi, claim.uid)
        hooks |= _hooks(path)
        if not lock.is_held(f"{settings.run}/lock", f"claim/{claim.uid}"):  # being prepared or unprepared
            check = f"claim {claim.namespace}/{claim.name}"
            found = _claim(settings, claim, since, attached, groups)
            bad += (Finding(check, *each) for each in found)
    for path, uid in _specs(settings.cdi):
        there = os.path.exists(f"{settings.run}/claims/{uid}.json")
        if not there and not lock.is_held(f"{settings.run}/lock", f"claim/{uid}"):
            bad.append(Finding(_CHECK, "warning", f"{path} is of a claim that is not prepared", "remove it"))
    bad += (Finding(_CHECK, *fault) for hook in sorted(hooks) for fault in _hook(hook))
    yield from bad
    if claims and not bad:
        yield Finding(_CHECK, "ok", f"{len(claims)} prepared, without a fault")


def _page(address: str) -> tuple[int, dict[str, Any]]:
    """(HTTP status, content) of the agent's page; 0 if it does not answer, which the check of the agent reports."""
    if not address:
        return 0, {}
    try:
        status, body = agent_page.read(address, "/claims")
        return status, json.loads(body) if status == HTTPStatus.OK else {}
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}


def _driver(state: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each as (severity, message, next step)."""
    if state["refused"]:
        yield (
            "error",
            f"the kubelet refuses the driver: {state['refused']}",
            "look at the kubelet's log for vmtap.dev",
        )
    elif not state["registered"]:
        yield (
            "error",
            f"the kubelet has not registered the driver, whose socket is in {state['kubelet']}/plugins_registry: no "
            "claim is prepared",
            "start the kubelet; or set kubelet in the agent's file to its folder",
        )
    else:
        yield "ok", f"the kubelet registered the driver at {_time(state['registered'])}", ""
    why = f": {state['error']}" if state["error"] else ""
    rights = "see that the API server answers, and that the agent has the rights of docs/dra.md"
    if not state["published"]:
        yield "error", f"the slices are not published, so no claim gets a device of this node{why}", rights
    elif why:
        yield (
            "warning",
            f"the slices were published at {_time(state['published'])}, and cannot be now{why}",
            rights,
        )
    elif not state["devices"]:
        yield "warning", "the slices have no device", "name in the policy a source that this node has"
    else:
        yield "ok", f"the slices have {state['devices']} devices, as of {_time(state['published'])}", ""
    if not state["connected"]:
        why = f": {state['nriError']}" if state["nriError"] else ""
        yield (
            "warning",
            f"the runtime's NRI at {state['nri']} is not connected{why}; the hook attaches, and the first container of "
            "each pod is created twice",
            "turn NRI on in the runtime, or set nri in the agent's file to its socket",
        )
    else:
        yield "ok", f"the runtime's NRI at {state['nri']} is connected", ""


def _claim(
    settings: Settings, claim: Claim, since: datetime, attached: set[str], groups: Cgroups
) -> Iterator[tuple[str, str, str]]:
    pod = f"{claim.namespace}/{claim.pod_name}"
    spec, file = cdi.claim_path(settings.cdi, claim.uid), f"{settings.run}/claims/{claim.uid}.json"
    if not groups.find(claim.pod_uid) and groups.seen:
        yield (
            "warning",
            f"its pod {pod} ({claim.pod_uid}) has gone, and the kubelet has not unprepared the claim",
            f"look at the kubelet's log; if it has forgotten the claim, remove {spec} and {file}",
        )
        return
    if not os.path.exists(spec):
        yield (
            "error",
            f"its CDI spec {spec} is missing: no container of pod {pod} can be created",
            "delete the pod, and let it be made again",
        )
    missing = [each.request for each in claim.devices if claim.attachment(each) not in attached]
    if missing and datetime.now(since.tzinfo) - since > _LONG:
        yield (
            "warning",
            f"it was prepared for pod {pod} at {_time(since.timestamp())}, and {', '.join(missing)} is not attached",
            f"kubectl -n {claim.namespace} describe pod {claim.pod_name}",
        )


def _hook(path: str) -> Iterator[tuple[str, str, str]]:
    """A fault of the file that the runtime executes before a container of a claim starts."""
    step = f"vmtapctl install --as vmtap-hook --bin-dir {os.path.dirname(path)}"
    try:
        executable = os.stat(path).st_mode & 0o111
    except OSError as error:
        yield (
            "error",
            f"the hook {path} cannot be executed ({error.strerror}): no container of a claim starts",
            step,
        )
        return
    if not executable:
        yield "error", f"the hook {path} is not executable: no container of a claim starts", step


def _hooks(spec: str) -> set[str]:
    """The paths of the hooks in a claim's CDI spec."""
    with suppress(OSError, ValueError, LookupError, TypeError), open(spec, "rb") as file:
        return {str(each["path"]) for each in json.load(file)["containerEdits"]["hooks"]}
    return set()


def _specs(folder: str) -> list[tuple[str, str]]:
    """(path, UID of the claim) of each CDI spec of a claim."""
    begin, end = cdi.claim_path(folder, "\0").split("\0")
    with suppress(OSError):
        paths = [f"{folder}/{name}" for name in sorted(os.listdir(folder))]
        return [
            (path, path.removeprefix(begin).removesuffix(end))
            for path in paths
            if path.startswith(begin) and path.endswith(end)
        ]
    return []


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
