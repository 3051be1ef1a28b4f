"""The lab: a host, a switch and a peer machine made of network namespaces, and what runs on them.

    wire.py        the namespaces, and the links between them
    frames.py      Ethernet frames without a guest
    guest.py       a virtual machine on a pod's attachments, started by vmtap-launch
    libvirt.py     a virtual machine as KubeVirt starts it
    cnitool.py     CNI's reference client
    runtimes/      containerd and podman on a machine of the lab, images for them
    kind/          a real kind cluster, on a docker of its own
    kubernetes/    a cluster of one node, stand-ins for a kubelet and Multus, checks of manifests
    hw.py          an emulated machine with SR-IOV NICs
    demo/ bench/ soak/   make demo, make bench, make soak
    assets/        what all of these download and build; lab/setup makes it
    process.py     running commands and programs

The demo, the benchmark and the tests use it. It is never shipped, and nothing in cni/ may import it.
"""
