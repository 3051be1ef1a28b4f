"""What the kernel is asked, one file for each interface: netlink, ioctls, namespaces, mounts, sysctls.

Must not decide anything, and must not know of records, configs or requests.
"""
