"""Keys that other programs have for what vmtap calls otherwise, or does not do. Keys are in lower case.

The programs are the plugins macvlan, ipvlan, vlan, bridge, tap, host-device, sriov-cni, ovs-cni and macvtap-cni, and
the operators that write their configs.
"""

from __future__ import annotations

_SOURCE = "give source, the name of the device, or interface, an entry of the node's policy file"
_BRIDGE = "give the Linux bridge as source"
_NO_BRIDGE = "vmtap sets up no bridge; leave it out"
_IPAM = "addresses and routes are given in ipam"
_LINK_NAME = "the runtime gives the name of the link in CNI_IFNAME; leave it out"
_RESOURCE = "it is the annotation k8s.v1.cni.cncf.io/resourceName of the NetworkAttachmentDefinition"
_SELINUX = "vmtap labels no device; leave it out"
_OVS = "it is for Open vSwitch, which vmtap does not use; leave it out"
_TRUNK = "there is no list of VLANs; give one as vlan, or leave it out"


def _called(name: str) -> str:
    return f'did you mean "{name}"?'


def _policy(name: str) -> str:
    return f"the node's policy file has it, as {name} of an entry of type sr-iov"


NETCONF = {
    **dict.fromkeys(("master", "lowerdevice", "parent", "dev", "nic", "kernelpath"), _SOURCE),
    **dict.fromkeys(
        ("pfname", "pfnames", "vf", "vfid"), "give interface, an entry of type sr-iov in the policy file"
    ),
    **dict.fromkeys(("bridge", "brname", "bridgename"), _BRIDGE),
    **dict.fromkeys(
        ("isgateway", "isdefaultgateway", "forceaddress"),
        f"the node is no gateway of a VM on a NIC; leave it out: {_IPAM}",
    ),
    **dict.fromkeys(
        ("hairpinmode", "preservedefaultvlan", "enabledad", "disablecontainerinterface"), _NO_BRIDGE
    ),
    **dict.fromkeys(("vlanid", "vlan_id", "vlantag", "tag"), _called("vlan")),
    **dict.fromkeys(("vlanqos", "vlan_qos", "vlanprio"), _called("vlanPriority")),
    **dict.fromkeys(("vlanproto", "vlan_proto"), _called("vlanProtocol")),
    **dict.fromkeys(("trunk", "vlantrunk", "vlan_trunk"), _TRUNK),
    **dict.fromkeys(("spoofchk", "macspoofchk"), _policy("spoofchk")),
    "trust": _policy("trust"),
    **dict.fromkeys(("linkstate", "link_state"), _policy("linkState")),
    **dict.fromkeys(("mintxrate", "min_tx_rate"), _policy("minTxRate")),
    **dict.fromkeys(("maxtxrate", "max_tx_rate"), _policy("maxTxRate")),
    "linkincontainer": "the source is always a device of the node; leave it out",
    "promiscmode": _called("promisc"),
    **dict.fromkeys(("macaddress", "hwaddr", "hwaddress"), _called("mac")),
    **dict.fromkeys(("multiqueue", "multi_queue"), "give queues, the number of queues"),
    "selinuxcontext": _SELINUX,
    **dict.fromkeys(("ips", "addresses", "ipaddresses", "routes", "gateway", "subnet", "ranges"), _IPAM),
    **dict.fromkeys(("ifname", "interfacename", "containerinterface"), _LINK_NAME),
    "resourcename": _RESOURCE,
    "plugins": "this is a list of plugins, of which a runtime passes on one at a time; name the file NAME.conflist",
    **dict.fromkeys(("loglevel", "logfile", "log_level", "log_file"), "the agent's file has logLevel"),
    **dict.fromkeys(
        (
            *("ofport_request", "socket_file", "configuration_path", "interface_type", "mirrors"),
            *("link_state_check_retries", "link_state_check_interval"),
        ),
        _OVS,
    ),
    "dpdkmode": "vmtap gives a VM a tap and not a device for DPDK; leave it out",
}
"""For a network config."""

POLICY = {
    **dict.fromkeys(("lowerdevice", "master", "dev", "device", "parent", "nic"), "give source: {dev: NAME}"),
    "mode": _called("modes"),
    **dict.fromkeys(("vlan", "vlanid"), _called("vlans")),
    **dict.fromkeys(("numvfs", "sriov_numvfs"), _called("vfs")),
    **dict.fromkeys(("pfname", "pfnames", "pf"), "give source: {dev: [NAME, ...]} and type: sr-iov"),
    **dict.fromkeys(("link_state",), _called("linkState")),
    "min_tx_rate": _called("minTxRate"),
    "max_tx_rate": _called("maxTxRate"),
    "resourcename": "an entry's name is the part of the resource name after the slash",
    "resourcelist": _called("interfaces"),
}
"""For a policy file."""
