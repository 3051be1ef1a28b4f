"""What people write: network configs, CNI_ARGS and the node's policy, turned into frozen dataclasses or refused.

Must not touch the network or the state folder.
"""
