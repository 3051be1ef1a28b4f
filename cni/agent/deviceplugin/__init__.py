"""The device plugin: offers the policy's interfaces to the kubelet as resources and answers its calls.

The only package that imports gRPC, which costs memory and start-up time: loaded only if devicePlugin is set.
"""

import os

# gRPC reads both when it is loaded. It logs to stderr, which the agent's log uses; and its fork handlers would delay
# each delegate, which executes another program and never uses gRPC.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
