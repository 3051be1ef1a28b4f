"""The contenders: ours, the reference plugins, and the kernel alone; and one measured call of each.

Must not choose the number or the order of calls: node.py does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cni.kernel import macvtap, rtnl
from lab.assets.programs import BENCH
from lab.bench.spawn import Job
from lab.bench.xxhash import xxh64
from lab.process import Closing, LabError, Program
from lab.wire import BRIDGE, NIC

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lab.bench.spawn import Spawner
    from lab.process import Word
    from lab.wire import Netns

BIN = Path(sys.executable).parent
TMPFS = "/dev/shm"  # noqa: S108 - a TemporaryDirectory is made in it
"""The folder for state: /run is a tmpfs on a host, but often not in a container."""
PORT = {
    "macSpoofCheck": True,
    "dhcpServer": False,
    "routerAdvertisements": False,
    "trunk": [],
    "broadcast": 1000,
    "rate": {"out": "1Gbit", "in": "1Gbit"},
}
"""All that a port can have without IPAM."""
POLICY = (
    {"name": "wire", "source": {"dev": NIC}, "type": "ethernet"},
    {"name": "bridge", "source": {"dev": BRIDGE}, "type": "ethernet"},
    {"name": "checked", "source": {"dev": NIC}, "port": {"macSpoofCheck": True}},
    {"name": "guarded", "source": {"dev": NIC}, "port": PORT},
)
"""The entries of the policy on a node of lab/wire.py."""
_SETTLE_SECONDS = 10.0
_LOOK_SECONDS = 0.002
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Place:
    """The sandbox and ifname of an attachment."""

    netns: Path
    container: str
    ifname: str = "net1"


@dataclass(frozen=True)
class Sample:
    """The cost of one call or of several at once: wall and CPU in milliseconds, peak memory in KiB."""

    wall: float
    cpu: float
    peak: int


class Agent(Program):
    """vmtapd on the node, started; a context manager.

    flags: after those that name its folders and no HTTP server; entries: the policy's.
    """

    def __init__(self, node: Netns, flags: Sequence[str] = (), entries: Sequence[object] = POLICY) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=f"vmtap-bench-{os.getpid()}-", dir=TMPFS)
        folder = Path(self._folder.name)
        self.run = folder / "vmtap"
        policy = folder / "interfaces.yaml"
        policy.write_text(json.dumps({"interfaces": list(entries)}))  # JSON is YAML
        # Two agents of one node would adopt the links of each other, and the one-shot's.
        unserved = ["--metrics", "", "--health", "", "--reconcile-seconds", "86400"]
        argv: list[Word] = [BIN / "vmtapd", "--run", self.run, "--policy", policy, *unserved, *flags]
        self._ready = folder / "ready"
        env = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(self._ready)}
        super().__init__(node.popen, argv, folder / "log", env)
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it is ready."""
        with _ReadySocket(self._ready) as ready:
            super().start()
            try:
                ready.wait()
            except TimeoutError:
                self.close()
                raise LabError(f"vmtapd is not ready after {_START_SECONDS:g} s") from None

    def cpu(self) -> int:
        """CPU time of all its threads, including ended ones, in nanoseconds (clock_getcpuclockid(3))."""
        return time.clock_gettime_ns((~self.pid << 3) | 2)

    def settle(self) -> None:
        """Waits until all its threads sleep, waiting for requests.

        The agent answers a DEL when the link is gone, and a thread of it stays in the kernel for another 15 to 40 ms.
        After an ADD it writes its log and looks at the link. This waits for the threads, so that their
        CPU time counts for the agent and does not slow down the next contender. There is no event to wait for.
        """
        until = time.monotonic() + _SETTLE_SECONDS
        quiet = 0
        while quiet < 2:
            if time.monotonic() > until:
                raise LabError(f"vmtapd is still running {_SETTLE_SECONDS:g} s after its answer")
            time.sleep(_LOOK_SECONDS)
            states = {_state(task / "stat") for task in Path(f"/proc/{self.pid}/task").iterdir()}
            quiet = quiet + 1 if states <= {"S", ""} else 0

    def handled(self, command: str, container: str) -> list[float]:
        """The duration of each request of a container, from the agent's log, in milliseconds, without transport."""
        lines = map(json.loads, self.output().splitlines())
        return [
            float(line["ms"])
            for line in lines
            if (line.get("command"), line.get("container")) == (command, container)
        ]

    def memory(self, field: str = "VmRSS") -> int:
        """A field of /proc/PID/status in KiB: VmRSS is the resident memory, VmHWM its peak."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
        raise LabError("vmtapd has ended")

    def close(self) -> None:
        self.kill(signal.SIGTERM)
        self._folder.cleanup()


def _state(stat: Path) -> str:
    """A thread's state (proc(5)), or "" if it has ended."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class _ReadySocket:
    """The receiver of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(_START_SECONDS)
        self._socket.bind(self.path)

    def wait(self) -> None:
        while b"READY=1" not in self._socket.recv(4096):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        Path(self.path).unlink()


@dataclass(frozen=True)
class Contender:
    """A CNI plugin and its network config."""

    name: str
    program: Path
    config: Mapping[str, object]
    env: Mapping[str, str] = field(default_factory=dict)
    agent: Agent | None = None
    """The agent whose CPU time and memory are added."""
    floor: Floor | None = None
    """Makes the link, if the plugin only moves one; the time is added."""
    before: tuple[str, ...] = ()
    """A command that runs the plugin: the first words of the command line."""

    def call(self, spawner: Spawner, command: str, places: Sequence[Place]) -> Sample:
        """Makes one call for each place, all at once. Raises LabError if one fails."""
        before = 0
        if self.floor and command == "ADD":
            before = sum(self.floor.prepare(_link(_device(place))) for place in places)
        spent = self.agent.cpu() if self.agent else 0
        outcomes = spawner.run([self._job(command, place) for place in places])
        for each in outcomes:
            if each.status != 0:
                raise spawner.failure(f"{self.name}: {command}", each)
        agent_cpu = agent_memory = 0
        if self.agent:
            self.agent.settle()
            agent_cpu = self.agent.cpu() - spent
            agent_memory = self.agent.memory()
        wall = max(each.end for each in outcomes) - min(each.begin for each in outcomes)
        return Sample(
            wall=(wall + before) / 1e6,
            cpu=(sum(each.cpu for each in outcomes) + agent_cpu) / 1e6,
            peak=max(each.peak for each in outcomes) + agent_memory,
        )

    def _job(self, command: str, place: Place) -> Job:
        env = {
            "PATH": os.environ["PATH"],
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": place.container,
            "CNI_NETNS": str(place.netns),
            "CNI_IFNAME": place.ifname,
            "CNI_PATH": str(self.program.parent),
            **self.env,
        }
        config = {"cniVersion": "1.0.0", "name": "wire", **self.config}
        if self.floor:
            config["deviceID"] = _device(place)
        return Job([*self.before, str(self.program)], env, json.dumps(config).encode())


def _device(place: Place) -> str:
    """The deviceID of a call, in the form of macvtap-cni's device plugin."""
    return f"{place.container[-8:]}Mvp0"


def _link(device: str) -> str:
    """The name of the link that macvtap-cni moves for a deviceID (its pkg/util/iface_name.go)."""
    return f"mvt{xxh64(device.encode()) & (1 << 48) - 1:012x}"


class Floor(Closing):
    """The kernel alone: this process sends the one message that creates or deletes a macvtap on the NIC."""

    def __init__(self, node: Netns, pod: Netns, nic: str = NIC) -> None:
        lower = node.links()[nic]["ifindex"]
        self._node = node.call(rtnl.Rtnl)
        self._pod = pod.call(rtnl.Rtnl)
        self._namespace = os.open(pod.path, os.O_RDONLY | os.O_CLOEXEC)
        self._lower = rtnl.u32(rtnl.IFLA_LINK, lower)

    def call(self, command: str) -> Sample:
        """Creates the link in the pod, or deletes it, as our plugin does."""
        begin, cpu = time.perf_counter_ns(), time.thread_time_ns()
        if command == "ADD":
            in_pod = rtnl.u32(rtnl.IFLA_NET_NS_FD, self._namespace)
            self._node.do(new_macvtap("floor0", self._lower + in_pod, up=True))
        else:
            self._pod.do(rtnl.link_message(rtnl.RTM_DELLINK, rtnl.text(rtnl.IFLA_IFNAME, "floor0")))
        return Sample((time.perf_counter_ns() - begin) / 1e6, (time.thread_time_ns() - cpu) / 1e6, 0)

    def prepare(self, name: str) -> int:
        """Makes a link on the node, for a plugin that moves it. Returns the time in nanoseconds."""
        begin = time.perf_counter_ns()
        self._node.do(new_macvtap(name, self._lower, up=False))
        return time.perf_counter_ns() - begin

    def close(self) -> None:
        self._node.close()
        self._pod.close()
        os.close(self._namespace)


def new_macvtap(name: str, lower: bytes, *, up: bool, index: int = 0) -> tuple[int, int, bytes]:
    """The message that creates a macvtap. lower: attributes, IFLA_LINK among them. index: 0: the kernel chooses one."""
    mode = rtnl.u32(rtnl.IFLA_MACVLAN_MODE, macvtap.MODES["bridge"])
    kind = rtnl.text(rtnl.IFLA_INFO_KIND, "macvtap")
    return rtnl.link_message(
        rtnl.RTM_NEWLINK,
        rtnl.text(rtnl.IFLA_IFNAME, name),
        lower,
        rtnl.nest(rtnl.IFLA_LINKINFO, kind, rtnl.nest(rtnl.IFLA_INFO_DATA, mode)),
        index=index,
        flags=rtnl.IFF_UP if up else 0,
        change=rtnl.IFF_UP if up else 0,
        nlm=rtnl.NLM_F_ACK | rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL,
    )


AGENT = "vmtap: agent and shim"
AGENT_CHECKED = "vmtap: agent and shim, macSpoofCheck"
AGENT_GUARDED = "vmtap: agent and shim, whole port"
AGENT_TAP = "vmtap: agent and shim, plain tap"
AGENT_BRIDGED = "vmtap: agent and shim, tap on a bridge"
AGENT_VLAN = "vmtap: agent and shim, VLAN"
AGENT_DEVICE = "vmtap: agent and shim, kubelet's device"
AGENT_VF = "vmtap: agent and shim, SR-IOV VF"
ONE_SHOT = "vmtap: one-shot"
GO_MACVLAN = "macvlan (reference, Go)"
GO_TAP = "tap (reference, Go)"
PEER = "kubevirt/macvtap-cni (Go)"
KERNEL = "kernel alone"


def macvtap_cni(program: Path, floor: Floor) -> Contender:
    """kubevirt/macvtap-cni, which refuses a cniVersion above 0.4.0. The floor makes the link that it moves."""
    return Contender(PEER, program, {"cniVersion": "0.4.0", "type": "macvtap"}, floor=floor)


def tap_on_bridge(agent: Agent) -> Contender:
    """A tap on the node's Linux bridge. The agent imports pyroute2 for it, which doubles its memory."""
    config = {"type": "vmtap", "interface": "bridge", "device": "tap", "mode": "bridge"}
    return Contender(AGENT_BRIDGED, BENCH.get() / "vmtap", config, {"VMTAP_RUN": str(agent.run)}, agent)


def has_vlans(node: Netns) -> bool:
    """Whether the kernel has VLAN devices (CONFIG_VLAN_8021Q)."""
    words = ["link", "add", "link", NIC, "name", "probe0", "type", "vlan", "id", "4094"]
    made = node.run(["ip", *words], check=False).returncode == 0
    if made:
        node.ip("link del probe0")
    return made


def contenders(
    agent: Agent, state: Path, floor: Floor, peer: Path | None = None, *, vlans: bool = False
) -> dict[str, Contender]:
    """All contenders by name.

    state: the one-shot's state folder; peer: the program of macvtap-cni, if there is one; vlans: whether the kernel has
    VLAN devices.
    """
    made = BENCH.get()
    bridge = {"interface": "wire", "device": "macvtap", "mode": "bridge", "type": "vmtap"}
    shim = {"VMTAP_RUN": str(agent.run)}
    one_shot = {"VMTAP_RUN": str(state), "VMTAP_POLICY": str(state / "none.yaml")}
    source = {"source": NIC, "device": "macvtap", "mode": "bridge", "type": "vmtap"}
    macvlan = {"type": "macvlan", "master": NIC, "mode": "bridge"}
    every = [
        Contender(AGENT, made / "vmtap", bridge, shim, agent),
        Contender(AGENT_CHECKED, made / "vmtap", {**bridge, "interface": "checked"}, shim, agent),
        Contender(AGENT_GUARDED, made / "vmtap", {**bridge, "interface": "guarded"}, shim, agent),
        Contender(AGENT_TAP, made / "vmtap", {"device": "tap", "type": "vmtap"}, shim, agent),
        Contender(
            AGENT_BRIDGED, made / "vmtap", {**bridge, "interface": "bridge", "device": "tap"}, shim, agent
        ),
        Contender(ONE_SHOT, BIN / "vmtap", source, one_shot),
        Contender(GO_MACVLAN, made / "macvlan", macvlan),
        Contender(GO_TAP, made / "tap", {"type": "tap"}),
    ]
    if vlans:
        every.append(Contender(AGENT_VLAN, made / "vmtap", {**bridge, "vlan": 100}, shim, agent))
    if peer:
        every.append(macvtap_cni(peer, floor))
    return {each.name: each for each in every}
