"""What arrives (Request), what this node gives to every request (Node), and the two put together (Call)."""

from __future__ import annotations

from functools import partial

from cni.attach.ipam import Delegate, print_stderr
from cni.dataclass import dataclass
from cni.errors import CniError
from cni.kernel.rtnl import delete_link
from cni.state.lock import keep_turn
from cni.state.record import identifier

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cni.config.netconf import NetConf
    from cni.config.policy import Grant, Policy
    from cni.kernel.rtnl import DeleteLink, Host, Link
    from cni.state.record import Record
    from cni.state.store import Store


@dataclass(frozen=True)
class Request:
    """One execution of the plugin: what the one-shot reads, and what the shim sends to the agent."""

    env: Mapping[str, str]
    """The whole environment; a delegate gets it."""
    stdin: bytes
    """The network config."""
    called_as: str = "vmtap"
    """The executable's name: "vmtap" or "macvtap"; "vmtap-hook" for a container's hook, which is no CNI request."""
    netns: int | None = None
    """An fd of CNI_NETNS where the caller has opened it; one of O_PATH will do."""
    ifindex: int = 0
    """The interface index that a resource claim has reserved, and keeps, for the attachment; 0: ADD reserves one."""
    function: str = ""
    """The PCI address of the virtual function that the device of a resource claim is; "" if it is none."""


@dataclass(frozen=True)
class Node:
    """What this node gives to every request."""

    store: Store
    policy: Callable[[], Policy | None]
    """The policy in force; None if there is none. Raises CniError 7."""
    delegate_seconds: float = 60.0
    """How long a delegate may take."""
    delete_link: DeleteLink = delete_link
    cdi: str | None = None
    """The folder of CDI specs, if the runtime gives devices to containers by CDI."""
    added: Callable[[Record, int], None] | None = None
    """Called after each ADD that has succeeded, with an fd of the pod's network namespace."""
    delegate_stderr: Callable[[str], None] = print_stderr
    """Called with what a delegate wrote to stderr."""
    confirm: Callable[[str, Mapping[str, str]], None] | None = None
    """Called with a kubelet's device id and CNI_ARGS: raises CniError unless the pod was allocated the device.

    None where no device plugin offers devices.
    """
    allocated: Callable[[], Mapping[int, str]] | None = None
    """The devices that the kubelet has allocated: interface index → device id. Raises CniError 11. None as above."""
    cgroup: Callable[[str], str] | None = None
    """The folder of a pod's control group, by the pod's UID; "" if it is not found."""
    handover: bool = False
    """Whether an agent watches for the guests of macvtaps in bridge mode (agent/handover.py)."""


@dataclass(frozen=True)
class Call:
    """A validated request on this node, for one attachment."""

    request: Request
    node: Node
    conf: NetConf
    arguments: Mapping[str, str]
    """CNI_ARGS."""
    host: Host
    netns: int | None
    """An open fd of the pod's network namespace; None if DEL could not open it, and for GC and STATUS."""
    yield_turn: Callable[[], None] = keep_turn
    """Called before a wait, so that the agent serves other requests meanwhile."""

    @property
    def container_id(self) -> str:
        """CNI_CONTAINERID; "" for GC and STATUS."""
        return self.request.env.get("CNI_CONTAINERID", "")

    @property
    def ifname(self) -> str:
        """CNI_IFNAME; "" for GC and STATUS."""
        return self.request.env.get("CNI_IFNAME", "")

    @property
    def netns_path(self) -> str:
        """CNI_NETNS; "" if it is not set."""
        return self.request.env.get("CNI_NETNS", "")

    @property
    def id(self) -> str:
        """The attachment's name in the store."""
        return identifier(self.conf.name, self.container_id, self.ifname)

    def delegate(self) -> Delegate | None:
        """The IPAM plugin that the config names; None if it names none."""
        if self.conf.ipam is None:
            return None
        return Delegate(
            str(self.conf.ipam["type"]),
            self.request.stdin,
            self.request.env,
            self.node.delegate_seconds,
            self.yield_turn,
            self.node.delegate_stderr,
        )

    def delegate_after_add(self, record: Record | None) -> Delegate | None:
        """delegate() for CHECK, DEL and GC, which the policy must not make fail: None if it does not allow it now.

        The plugin that the attachment was added with, by its record, is allowed whatever the policy has become. For
        DEL, another one that is not installed is None, too: ADD was refused for it.
        """
        delegate = self.delegate()
        if delegate is None or (record and record.config and record.config["ipam"]["type"] == delegate.type):
            return delegate
        if self.request.env.get("CNI_COMMAND") == "DEL" and not delegate.installed():
            return None
        try:
            policy = self.node.policy()
        except CniError:
            return None
        return delegate if policy is None or policy.allows_delegate(delegate.type) else None

    def source(self, grant: Grant) -> Link | None:
        """The first of the granted devices that is there; None if none is, or none was granted. Raises OSError."""
        return next(filter(None, (self.host.link(name=name) for name in grant.sources)), None)

    @property
    def delete_link(self) -> DeleteLink:
        """The node's, which yields this call's turn before it waits."""
        return partial(self.node.delete_link, yield_turn=self.yield_turn)
