"""Requests to the kernel, one file for each interface: netlink, ioctls, namespaces, mounts, sysctls.

Must not decide which attachment gets what.
"""
