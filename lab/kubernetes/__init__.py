"""Kubernetes: a real cluster of one node, stand-ins for a kubelet's device manager and Multus, checks of manifests."""
