"""The device plugin: offers the node's named interfaces to a kubelet, and answers what it asks of their devices.

The one place that knows gRPC, which costs the agent memory and start-up: imported only where the settings ask for it.
"""
