"""vmtapctl doctor: checks of the node, each with a severity and a next step. docs/vmtapctl.md lists them.

"error": an ADD, or a VM, fails or will. "warning": it works, and somebody should look. Must change nothing: to
try something it makes namespaces of its own (self_test.py). Connecting to the agent's socket starts it where systemd
listens for it, as the next pod would.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import struct
from contextlib import suppress

from cni.agent.policies import VARIABLE
from cni.config import policy
from cni.ctl import (
    agent_page,
    claim_findings,
    device_findings,
    kubelet,
    port_findings,
    reflection,
    self_test,
    snapshot,
)
from cni.ctl.finding import Finding
from cni.errors import CniError, reason
from cni.state import lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.config.policy import Policy
    from cni.ctl.locations import Settings

_SECONDS = 3.0
_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_FOWNER": 3,
    "CAP_NET_BROADCAST": 11,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}
"""The capabilities that the agent needs (linux/capability.h). deploy/systemd/vmtapd.service has the reasons."""
_MODULES = {
    self_test.STEPS[1]: "modprobe tun; where that fails, boot a kernel with CONFIG_TUN",
    self_test.STEPS[2]: "modprobe macvtap; where that fails, boot a kernel with CONFIG_MACVTAP",
    self_test.STEPS[3]: "boot Linux 5.2 or newer",
    self_test.STEPS[4]: "boot Linux 5.2 or newer",
    self_test.STEPS[5]: "boot Linux 5.2 or newer",
}


def examine(settings: Settings) -> list[Finding]:
    """Run all checks, each after those that it depends on. Stops where the next ones cannot work."""
    found = [*_user()]
    if found[-1].severity == "error":
        return found
    found += [*_kernel(settings), *_vhost(), *_file(settings)]
    rules = None
    try:
        rules = policy.load(settings.policy)
        found += [_policy(settings, rules), *port_findings.kernel(rules)]
    except CniError as error:
        found.append(
            Finding("policy", "error", str(error), "correct it; until then every ADD is refused (code 7)")
        )
    found += _agent(settings)
    found += _state(settings)
    try:
        node = snapshot.take(settings)
    except CniError as error:
        found.append(
            Finding("attachments", "error", str(error), "correct the findings on user and kernel above")
        )
        return found
    for source in node.sources:
        found += device_findings.source(node, source)
    found += [Finding(*each) for each in reflection.examine(settings.run, node)]
    found += [Finding("device plugin", *each) for each in kubelet.examine(settings)]
    found += claim_findings.examine(settings, node)
    found += device_findings.attachments(node)
    found += port_findings.wider(rules, node)
    return found


def _user() -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding("user", "ok", "root")
    else:
        yield Finding(
            "user", "error", f"uid {os.geteuid()} cannot enter other network namespaces", "run it as root"
        )


def _kernel(settings: Settings) -> Iterator[Finding]:
    release = os.uname().release
    failed = False
    for step, why in self_test.run(opens=settings.broker).items():
        if why:
            failed = True
            root = "give vmtapctl the capabilities of the host's root"
            refused = "not permitted" in why or "CAP_SYS_ADMIN" in why
            yield Finding("kernel", "error", f"{step}: {why}", root if refused else _MODULES.get(step, root))
    if not failed:
        opens = "makes, opens and shows" if settings.broker else "makes and shows"
        yield Finding("kernel", "ok", f"Linux {release} {opens} macvtaps and taps (tested)")


def _vhost() -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if _knows("vhost-net"):
            yield Finding("vhost", "ok", "the kernel has it; this container has no /dev/vhost-net")
            return
        yield Finding(
            "vhost",
            "warning",
            f"/dev/vhost-net cannot be opened ({error.strerror}): QEMU copies every frame in user space",
            "modprobe vhost_net",
        )
    else:
        yield Finding("vhost", "ok", "/dev/vhost-net opens")


def _knows(device: str) -> bool:
    """Whether the kernel has that misc device loaded (/proc/misc): a container's /dev may not show it."""
    with open("/proc/misc", encoding="ascii") as file:
        known = any(line.split()[1:] == [device] for line in file)
    return known and not os.path.exists(f"/dev/{device}")


def _file(settings: Settings) -> Iterator[Finding]:
    if settings.fault:
        yield Finding(
            "agent's file", "error", str(settings.fault), "correct it; vmtapd does not start with it"
        )


def _policy(settings: Settings, rules: Policy | None) -> Finding:
    if rules is None and settings.device_plugin and VARIABLE not in os.environ:
        return Finding(
            "policy",
            "error",
            f"there is no {settings.policy}, and the device plugin is on: every ADD is refused (code 7)",
            f"write one; an empty one allows nothing. Or give the agent {VARIABLE}",
        )
    if rules is None:
        return Finding(
            "policy",
            "warning",
            f"there is no {settings.policy}: a network config may name any device of this node as its source",
            "write one that names the devices which VMs may use (docs/configuration.md)",
        )
    names = ", ".join(entry.name for entry in rules.interfaces) or "nothing"
    others = "; network configs may name other devices, too" if rules.allow_unlisted else ""
    if rules.ipam_types is not None:
        others += f"; they may delegate to {', '.join(rules.ipam_types) or 'no IPAM plugin'}"
    return Finding("policy", "ok", f"{settings.policy} names {names}{others}")


def _agent(settings: Settings) -> Iterator[Finding]:
    path = f"{settings.run}/agent/cni.sock"
    if not os.path.exists(f"{settings.run}/agent"):
        yield Finding(
            "agent", "ok", f"none has run on {settings.run}: the one-shot executable serves requests"
        )
        return
    start = "start it: systemctl start vmtapd.socket, or see why its pod does not run"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.settimeout(_SECONDS)
            agent.connect(path)
            credentials = agent.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError as error:
        yield Finding(
            "agent", "error", f"it does not answer at {path} ({error.strerror}): ADDs wait, then fail", start
        )
        return
    pid, _, _ = struct.unpack("=iII", credentials)
    if pid and _program(pid) != "systemd":
        if missing := [name for name in _missing(pid) if settings.broker or name != "CAP_SYS_PTRACE"]:
            yield Finding(
                "agent",
                "error",
                f"it (pid {pid}) lacks {', '.join(missing)}",
                "add them: CapabilityBoundingSet= of vmtapd.service, or the container's securityContext",
            )
        else:
            yield Finding(
                "agent", "ok", f"it listens at {path} (pid {pid}) and has the capabilities it needs"
            )
    else:
        who = "systemd" if pid else "a process of another pid namespace"
        yield Finding("agent", "ok", f"{who} listens for it at {path}")
    yield from _ready(settings.health)


def _program(pid: int) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _missing(pid: int) -> list[str]:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        (held,) = (int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]


def _ready(address: str) -> Iterator[Finding]:
    if not address:
        return
    try:
        reasons = json.loads(agent_page.read(address, "/readyz")[1])["reasons"]
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        yield Finding(
            "agent",
            "warning",
            f"its http://{address}/readyz cannot be read ({reason(error)})",
            "look at its log; or set health in its file to where it can listen",
        )
    else:
        for what, why in reasons.items():
            yield Finding("agent", "error", f"it is not ready: {what}: {why}", "look at its log")
        if not reasons:
            yield Finding("agent", "ok", f"it is ready, by http://{address}/readyz")


def _state(settings: Settings) -> Iterator[Finding]:
    run = settings.run
    try:
        status = os.stat(run)
    except FileNotFoundError:
        yield Finding("state", "ok", f"{run} does not exist yet: nothing was attached")
        return
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        yield Finding(
            "state",
            "error",
            f"users other than root can read or write {run}",
            f"chown root {run}; chmod 0700 {run}",
        )
    elif (kind := _filesystem(status.st_dev)) not in ("tmpfs", None):
        yield Finding(
            "state",
            "warning",
            f"{run} is on {kind}: records survive a reboot",
            "put it on a tmpfs, as /run is",
        )
    else:
        yield Finding("state", "ok", f"{run} belongs to root, mode 0700" + (", on a tmpfs" if kind else ""))
    for path in sorted(_entries(f"{run}/pending")):
        yield Finding(
            "state",
            "warning",
            f"{path}: a DEL that waits for the agent",
            "start the agent: it carries the DEL out",
        )
    known = {name.removesuffix(".json") for name in _names(f"{run}/attachments") if name.endswith(".json")}
    with suppress(CniError):  # the snapshot reports it
        known |= {
            claim.attachment(each) for claim, _ in snapshot.read_claims(run)[0] for each in claim.devices
        }
    for path in sorted(_entries(f"{run}/ifindex") + _entries(f"{run}/vf")):
        id = os.readlink(path)
        if id not in known and not lock.is_held(f"{run}/lock", id):
            yield Finding(
                "state",
                "warning",
                f"{path} is reserved for {id}, which has no record: an ADD was killed",
                "start the agent, or run GC of any vmtap network: both release it",
            )


def _filesystem(device: int) -> str | None:
    """The type of the file system of that st_dev; None if no mount of this mount namespace has it."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if words[2] == wanted:
                return words[words.index("-") + 1]
    return None


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _entries(folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in _names(folder)]
