"""The device plugin: offers the node's named interfaces to a kubelet, and answers what it asks of their devices.

The one place that knows gRPC, which costs the agent memory and start-up: imported only where the settings ask for it.
"""

import os

# Read when gRPC is loaded. What it says goes to stderr, which is our log's; and its handlers of a fork would hold up
# each delegate, which is a new program and knows nothing of gRPC.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
