"""What is wrong on this node: each finding with its severity and its next step. docs/vmtapctl.md lists them.

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
from dataclasses import dataclass

from cni.config import policy
from cni.ctl import inventory, kubelet, reflection, self_test, virtual_functions
from cni.errors import CniError
from cni.kernel import ethtool
from cni.kernel.rtnl import ARPHRD_ETHER, Rtnl
from cni.lower import offload
from cni.state import lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni.config.policy import Policy
    from cni.ctl.inventory import Attachment, Node, Source
    from cni.ctl.locations import Settings
    from cni.kernel.rtnl import Link

_MACVLAN_MODE_PASSTHRU = 8
_SECONDS = 3.0
_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_FOWNER": 3,
    "CAP_NET_BROADCAST": 11,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}
"""What the agent has to have (linux/capability.h); deploy/systemd/vmtapd.service says what for."""
_MODULES = {
    self_test.STEPS[1]: "modprobe tun; where that fails, boot a kernel with CONFIG_TUN",
    self_test.STEPS[2]: "modprobe macvtap; where that fails, boot a kernel with CONFIG_MACVTAP",
    self_test.STEPS[3]: "boot Linux 5.2 or newer",
    self_test.STEPS[4]: "boot Linux 5.2 or newer",
    self_test.STEPS[5]: "boot Linux 5.2 or newer",
}
_OFFLOADS = {
    "tx-generic-segmentation": "gso",
    "rx-checksum": "rx",
}
"""Kernel's name → ethtool -K's, of what a VM's throughput needs of any NIC."""


@dataclass(frozen=True)
class Finding:
    """severity: "ok", "warning" or "error"; next_step is empty for the first only."""

    check: str
    severity: str
    message: str
    next_step: str = ""

    def document(self) -> dict[str, str]:
        """For programs."""
        return {
            "check": self.check,
            "severity": self.severity,
            "message": self.message,
            "nextStep": self.next_step,
        }


def examine(settings: Settings) -> list[Finding]:
    """Everything, in the order of what depends on what."""
    found = [*_user()]
    if found[-1].severity == "error":
        return found
    found += [*_kernel(settings), *_vhost(), *_file(settings)]
    rules = None
    try:
        rules = policy.load(settings.policy)
        found.append(_policy(settings, rules))
    except CniError as error:
        found.append(
            Finding("policy", "error", str(error), "correct it; until then every ADD is refused (code 7)")
        )
    found += _agent(settings)
    found += _state(settings)
    try:
        node = inventory.take(settings)
    except CniError as error:
        found.append(
            Finding("attachments", "error", str(error), "mend what is said above of user and kernel")
        )
        return found
    for source in node.sources:
        found += _source(node, source)
    found += [Finding(*each) for each in reflection.examine(settings.run, node)]
    found += [Finding("device plugin", *each) for each in kubelet.examine(settings)]
    found += _attachments(node)
    return found


def _user() -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding("user", "ok", "root")
    else:
        yield Finding(
            "user", "error", f"uid {os.geteuid()} may not look at other namespaces", "run it as root"
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
        yield Finding("kernel", "ok", f"Linux {release} {opens} macvtaps and taps: it was tried")


def _vhost() -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if _knows("vhost-net"):
            yield Finding("vhost", "ok", "the kernel has it; /dev/vhost-net is not for this container")
            return
        yield Finding(
            "vhost",
            "warning",
            f"/dev/vhost-net cannot be opened ({error.strerror}): QEMU copies every frame itself",
            "modprobe vhost_net",
        )
    else:
        yield Finding("vhost", "ok", "/dev/vhost-net opens")


def _knows(device: str) -> bool:
    """Does the kernel have that device, loaded (/proc/misc), and we run where not all devices are shown?"""
    with open("/proc/misc", encoding="ascii") as file:
        known = any(line.split()[1:] == [device] for line in file)
    return known and not os.path.exists(f"/dev/{device}")


def _file(settings: Settings) -> Iterator[Finding]:
    if settings.fault:
        yield Finding(
            "agent's file", "error", str(settings.fault), "correct it; vmtapd does not start with it"
        )


def _policy(settings: Settings, rules: Policy | None) -> Finding:
    if rules is None:
        return Finding(
            "policy",
            "warning",
            f"there is no {settings.policy}: a network config may name any device of this node as its source",
            "write one that names the devices which VMs may use (docs/configuration.md)",
        )
    names = ", ".join(entry.name for entry in rules.interfaces) or "nothing"
    others = "; network configs may name other devices, too" if rules.allow_unlisted else ""
    return Finding("policy", "ok", f"{settings.policy} names {names}{others}")


def _agent(settings: Settings) -> Iterator[Finding]:
    path = f"{settings.run}/agent/cni.sock"
    if not os.path.exists(f"{settings.run}/agent"):
        yield Finding("agent", "ok", f"none has run on {settings.run}: the one-shot executable does the work")
        return
    start = "start it: systemctl start vmtapd.socket, or see why its pod does not run"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
            asked.settimeout(_SECONDS)
            asked.connect(path)
            credentials = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
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
                f"it (pid {pid}) has not {', '.join(missing)}",
                "give it these: CapabilityBoundingSet= of vmtapd.service, or the container's securityContext",
            )
        else:
            yield Finding(
                "agent", "ok", f"it listens at {path} (pid {pid}) and has the capabilities it needs"
            )
    else:
        who = "systemd" if pid else "a process out of sight (another pid namespace)"
        yield Finding("agent", "ok", f"{who} listens for it at {path}")
    yield from _ready(settings.metrics)


def _program(pid: int) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _missing(pid: int) -> list[str]:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        (held,) = (int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]


def _ready(metrics: str) -> Iterator[Finding]:
    if not metrics:
        return
    host, _, port = metrics.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]") or "127.0.0.1", int(port), timeout=_SECONDS)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        reasons = json.loads(answer.read(1 << 16))["reasons"]
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        yield Finding(
            "agent",
            "warning",
            f"its http://{metrics}/readyz cannot be read ({error})",
            "look at its log; or set metrics in its file to where it can listen",
        )
    else:
        for what, why in reasons.items():
            yield Finding("agent", "error", f"it is not ready: {what}: {why}", "look at its log")
        if not reasons:
            yield Finding("agent", "ok", f"it is ready, by http://{metrics}/readyz")
    finally:
        connection.close()


def _state(settings: Settings) -> Iterator[Finding]:
    run = settings.run
    try:
        status = os.stat(run)
    except FileNotFoundError:
        yield Finding("state", "ok", f"there is no {run} yet: nothing was ever attached")
        return
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        yield Finding(
            "state", "error", f"others may look into or write to {run}", f"chown root {run}; chmod 0700 {run}"
        )
    elif (kind := _filesystem(status.st_dev)) not in ("tmpfs", None):
        yield Finding(
            "state",
            "warning",
            f"{run} is on {kind}: what it says outlives a reboot",
            "put it on a tmpfs, as /run is",
        )
    else:
        yield Finding("state", "ok", f"{run} is root's alone" + (", on a tmpfs" if kind else ""))
    for path in sorted(_entries(f"{run}/pending")):
        yield Finding(
            "state",
            "warning",
            f"{path}: a DEL that came while the agent was away",
            "start the agent: it carries it out",
        )
    known = {name.removesuffix(".json") for name in _names(f"{run}/attachments") if name.endswith(".json")}
    for path in sorted(_entries(f"{run}/ifindex") + _entries(f"{run}/vf")):
        id = os.readlink(path)
        if id not in known and not lock.is_held(f"{run}/lock", id):
            yield Finding(
                "state",
                "warning",
                f"{path} is reserved for {id}, which has no record: an ADD was killed",
                "GC of any vmtap network gives it back, and so does the agent",
            )


def _source(node: Node, source: Source) -> Iterator[Finding]:
    check = f"source {source.name}"
    bad = list(_faults(node, source))
    yield from (Finding(check, *fault) for fault in bad)
    if not bad and source.link:
        over = f" over {', '.join(source.nics)}" if source.nics not in ((), (source.name,)) else ""
        room = [f"{e.name}: {node.count(e)} of {e.capacity} attached" for e in source.entries if e.capacity]
        if source.most:
            room.append(virtual_functions.summary(node, source))
        yield Finding(check, "ok", "; ".join([f"{source.state}{over}, MTU {source.link.mtu}", *room]))


def _faults(node: Node, source: Source) -> Iterator[tuple[str, str, str]]:
    """(severity, what, next step)."""
    link = source.link
    for entry in source.entries:
        if entry.functions and link:
            yield from virtual_functions.faults(node, source, entry)
        if entry.type == "vmdq" and link:
            yield from _offload(node, source, entry.name)
        if entry.capacity and node.count(entry) > entry.capacity:
            yield (
                "warning",
                f"interface {entry.name} has {node.count(entry)} attachments, and a capacity of {entry.capacity}",
                "raise the capacity, or move VMs to another node",
            )
    if link:
        yield from _link_faults(node, source, link)
    else:
        yield (
            "error",
            "it is not on this node",
            "plug it in, or correct source.dev in the policy (ip link lists what is there)",
        )


def _offload(node: Node, source: Source, name: str) -> Iterator[tuple[str, str, str]]:
    if not ethtool.can(source.name, offload.FEATURE):
        yield (
            "error",
            f"interface {name} is of type vmdq, and the NIC or its driver has no {offload.FEATURE}",
            "make it of type ethernet",
        )
        return
    wanted = sum(each.record.interface == name for each in node.attachments)
    if (taken := offload.taken(source.name)) < wanted:
        yield (
            "warning",
            f"the NIC sorts for {taken} of {wanted} attachments of {name}; for the others the kernel does, slower",
            "look at its number of queues (ethtool -l), or attach fewer",
        )


def _link_faults(node: Node, source: Source, link: Link) -> Iterator[tuple[str, str, str]]:
    name = source.name
    if link.arphrd != ARPHRD_ETHER or link.kind == "macvtap":
        yield (
            "error",
            "it is not an Ethernet device that can carry others",
            "name a NIC, a bond, a VLAN or a bridge",
        )
    if source.state == "down":
        yield "error", "it is down, and so is every VM's wire on it", f"ip link set {name} up"
    elif source.state == "no carrier":
        yield (
            "warning",
            "it has no carrier: no VM on it reaches anything",
            "look at the cable, and at the switch's port",
        )
    if source.master:
        yield (
            "error",
            f"it is a port of {source.master}, and a port takes no macvtap",
            f"name {source.master} as the source, or take it out: ip link set {name} nomaster",
        )
    with Rtnl() as host:
        takers = [
            each.name
            for each in host.links()
            if each.lower == link.index and each.lower_nsid is None and each.mode == _MACVLAN_MODE_PASSTHRU
        ]
    if takers:
        yield (
            "error",
            f"{takers[0]} has all of it (passthru)",
            f"ip link delete {takers[0]}, or use another NIC",
        )
    small = [each for each in node.on(name) if each.link and each.link.mtu > link.mtu]
    if small:
        record = small[0].record
        yield (
            "error",
            f"its MTU {link.mtu} is less than the {record.mtu} of {record.ifname} of {small[0].sandbox}",
            f"ip link set {name} mtu {record.mtu}",
        )
    for nic in source.nics:
        try:
            offloads = ethtool.features(nic)
        except OSError:  # a device that has none to speak of
            continue
        for feature, option in _OFFLOADS.items():
            if offloads.get(feature) is False:
                what = f"the offload {feature} of {nic} is off: VMs get less out of it"
                yield "warning", what, f"ethtool -K {nic} {option} on"


def _attachments(node: Node) -> Iterator[Finding]:
    for path, why in node.unreadable.items():
        yield Finding(
            "attachments", "warning", f"{path}: {why}", "look at it, then remove it; DEL does not need it"
        )
    bad = [finding for each in node.attachments for finding in _attachment(each)]
    yield from bad
    if not bad:
        yield Finding("attachments", "ok", f"{len(node.attachments)}, and each is as it should be")


def _attachment(each: Attachment) -> Iterator[Finding]:
    record = each.record
    check = f"{each.sandbox} {record.ifname}"
    if each.link and record.vf:
        yield from (Finding(check, *found) for found in virtual_functions.changes(each))
    if each.status in ("gone", "old"):
        why = "its link is gone" if each.status == "gone" else "it is of an earlier boot"
        yield Finding(
            check,
            "warning",
            f"there is a record of it ({record.id}), but {why}",
            "the agent ends it by itself; without one, DEL it, or GC its network",
        )
    elif each.status == "down":
        inside = f"nsenter --net={record.netns} ip link set {record.ifname} up"
        yield Finding(check, "error", "somebody has set its link down", inside)
    holders = [holder for holder in each.holders if holder.queues]
    if len(holders) > 1 or sum(holder.queues for holder in holders) > record.queues:
        who = ", ".join(f"{holder.program} {holder.pid} ({holder.queues})" for holder in holders)
        yield Finding(
            check,
            "warning",
            f"queues: {record.queues}, and it is open in {who}: frames are shared out, and get lost",
            "end the process that should not have it",
        )


def _filesystem(device: int) -> str | None:
    """The kind of the file system of that st_dev; None if no mount of this namespace has it."""
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
