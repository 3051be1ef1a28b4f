"""What is not on the way of a macvtap: a tap becomes a port of a Linux bridge, and addresses are put on a link.

The only importer of pyroute2, whose import takes 160 ms. Must not decide anything.

A veth pair carries a tap's frames to the bridge (bridge_port.py). Its pod end and the tap redirect to each other at
ingress (u32 that matches every frame, mirred redirect: net/sched/act_mirred.c). The redirect passes on the same skb, so
checksum and GSO offloads stay intact, and the pod's own stack sees no frame.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from cni.errors import SHORTAGE, CniError
from cni.kernel import bridge_port, ethtool, ipv6, netns
from cni.spec import KERNEL_REFUSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

_INGRESS = 0xFFFF0000
_ETH_P_ALL = 3
_IFA_F_NODAD = 0x02


def join_bridge(
    pod_netns: int,
    *,
    tap: int,
    mtu: int,
    bridge: int,
    isolated: bool,
    alias: str,
    sums: bool,
    before_up: Callable[[], None],
) -> None:
    """Make a tap a port of a bridge on the host. tap, bridge: interface indexes; alias: the pair's. Raises OSError.

    sums: whether checksums that the guest leaves to its host may be left to the NIC; else they are in the frame when it
    reaches the port. before_up is called while the port is down.
    """
    host_end, pod_end = bridge_port.veth_names(tap)
    with _sockets(pod_netns) as (host, pod):
        host.link(
            "add",
            kind="veth",
            ifname=host_end,
            mtu=mtu,
            peer={"ifname": pod_end, "net_ns_fd": pod_netns, "mtu": mtu},
        )
        (port,) = host.link_lookup(ifname=host_end)
        (inner,) = pod.link_lookup(ifname=pod_end)
        ipv6.keep_out(host_end, speaks=False)
        with netns.entered(pod_netns):
            ipv6.keep_out(pod_end, speaks=False)
            if not sums:
                ethtool.switch(pod_end, "tx-checksum-ip-generic", False)
        host.link("set", index=port, ifalias=alias, address=bridge_port.host_mac(tap))
        pod.link("set", index=inner, ifalias=alias)
        host.link("set", index=port, master=bridge)
        if isolated:
            host.brport("set", index=port, isolated=True)
        for source, target in ((tap, inner), (inner, tap)):
            pod.tc("add", "ingress", index=source)
            pod.tc(
                "add-filter",
                "u32",
                index=source,
                parent=_INGRESS,
                protocol=_ETH_P_ALL,
                prio=1,
                target=0x10000,
                keys=["0x0/0x0+0"],
                action={"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target},
            )
        pod.link("set", index=inner, state="up")
        before_up()
        host.link("set", index=port, state="up")


def put_addresses(
    pod_netns: int, ifindex: int, addresses: list[str], routes: list[dict[str, Any]], gateways: dict[int, str]
) -> None:
    """Put addresses ("10.1.0.5/24") and routes of a CNI result on the link of that index.

    gateways: of routes that name none, by IP version (4 or 6). Without duplicate address detection, as the addresses
    were leased. A route follows those that other links of the pod have to its destination; the kernel combines IPv6
    routes of one metric into one with several next hops. Raises OSError, CniError 100 that names the address or route.
    """
    with _socket(pod_netns) as pod:
        for address in addresses:
            local, _, length = address.partition("/")
            version6 = {"flags": _IFA_F_NODAD} if ":" in local else {}
            with _refused(f"address {address}", "it is in the result of ipam twice"):
                pod.addr("add", index=ifindex, address=local, prefixlen=int(length), **version6)
        for route in routes:
            version = 6 if ":" in route["dst"] else 4
            via = route.get("gw") or gateways.get(version)
            extra: dict[str, Any] = {
                key: route[key] for key in ("priority", "table", "scope") if key in route
            }
            metrics = {key: route[key] for key in ("mtu", "advmss") if key in route}
            if metrics:
                extra["metrics"] = metrics
            what = f"route {route['dst']}" + (f" by gateway {via}" if via else "")
            unreachable = f"{via} is in no network of the addresses {', '.join(addresses)}"
            with _refused(what, "it is in the result of ipam twice", unreachable):
                # Not "add", which refuses a route that another link has.
                pod.route(
                    "append", dst=route["dst"], oif=ifindex, **({"gateway": via} if via else {}), **extra
                )


def addresses(pod_netns: int, ifindex: int) -> set[str]:
    """The addresses on the link of that index, each as "10.1.0.5/24". Raises OSError."""
    with _socket(pod_netns) as pod:
        return {
            f"{found.get_attr('IFA_ADDRESS')}/{found['prefixlen']}" for found in pod.get_addr(index=ifindex)
        }


@contextmanager
def _refused(what: str, exists: str, unreachable: str = "") -> Iterator[None]:
    """Turn the kernel's refusal of an address or a route into CniError 100; a shortage stays as it is."""
    try:
        yield
    except NetlinkError as error:
        if error.code in SHORTAGE:
            raise
        causes = {errno.EEXIST: exists, **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH), unreachable)}
        why = causes.get(error.code) or "the kernel refused it"
        message = f"{what} cannot be put on the link: {why}; correct ipam"
        raise CniError(KERNEL_REFUSED, message, str(error.args[-1])) from error


@contextmanager
def _socket(pod_netns: int | None = None) -> Iterator[IPRoute]:
    """A socket of that network namespace, or of the host's. Turns pyroute2's errors into OSError."""
    if pod_netns is None:
        opened = IPRoute(ext_ack=True)
    else:
        with netns.entered(pod_netns):
            opened = IPRoute(ext_ack=True)
    try:
        yield opened
    except NetlinkError as error:
        raise OSError(error.code, str(error.args[-1])) from error
    finally:
        opened.close()


@contextmanager
def _sockets(pod_netns: int) -> Iterator[tuple[IPRoute, IPRoute]]:
    with _socket() as host, _socket(pod_netns) as pod:
        yield host, pod
