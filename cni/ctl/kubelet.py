"""For doctor: what the agent offers to the kubelet, by the agent's metrics and the kubelet's sockets. Only reads."""

from __future__ import annotations

import http.client
import re
import socket

from cni.ctl import agent_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.ctl.locations import Settings

_SECONDS = 3.0
_SAMPLE = re.compile(
    r'^vmtap_device_plugin_(\w+?)(?:\{resource="([^"]*)"(?:,health="(\w+)")?\})? ([0-9.e+]+)$', re.MULTILINE
)


def examine(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Each finding as (severity, message, next step); none if the device plugin is off."""
    if not settings.device_plugin:
        return
    path = f"{settings.kubelet}/kubelet.sock"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as kubelet:
            kubelet.settimeout(_SECONDS)
            kubelet.connect(path)
    except OSError as error:
        step = "start the kubelet; or set kubelet in the agent's file to its folder"
        yield "error", f"no kubelet answers at {path} ({error.strerror}): no pod gets a device", step
        return
    yield "ok", f"a kubelet answers at {path}", ""
    if settings.metrics:
        try:
            text = agent_page.read(settings.metrics, "/metrics")[1].decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return  # the check of the agent reports the reason
        yield from _resources(text)


def _resources(text: str) -> Iterator[tuple[str, str, str]]:
    found = {
        (name, resource, health): float(value)
        for name, resource, health, value in (match.groups() for match in _SAMPLE.finditer(text))
    }
    if ("not_offered", None, None) not in found:
        step = "restart it: the settings were changed after its start"
        yield "error", "the agent runs without the device plugin that its settings ask for", step
        return
    if left := int(found["not_offered", None, None]):
        step = 'look at its log for "interface is not offered to the kubelet"'
        yield "warning", f"{left} of the policy's interfaces are not offered", step
    for (name, resource, _), registered in found.items():
        if name != "registered":
            continue
        well, sick = (int(found["devices", resource, health]) for health in ("Healthy", "Unhealthy"))
        if not registered:
            step = "look at the agent's log for \"not registered\", and at the kubelet's"
            yield (
                "error",
                f"{resource} is not registered with the kubelet: it watches no list of its devices",
                step,
            )
        elif sick:
            step = "correct the findings on its source above; the agent's log has the reason for each device"
            some = f"{sick} of its {well + sick}" if well else f"its {sick}"
            yield "warning", f"{resource}: {some} devices are unhealthy, and no new pod gets one", step
        elif not well:
            step = "make virtual functions: see the finding on its source above"
            yield "warning", f"{resource} is registered, and has no devices", step
        else:
            yield "ok", f"{resource} is registered, with {well} devices", ""
