"""The lab: a host, a switch and a peer machine made of network namespaces, guests on them, the demo.

Used by the demo and by the tests; never shipped, and nothing in cni/ may import it.
"""
