"""What is kept on the node between two requests: records, locks, reservations, CDI specs, probe results.

Must not touch the network.
"""
