"""The driver of Dynamic Resource Allocation: a ResourceClaim alone attaches a VM.

It offers the policy's interfaces in ResourceSlices, and prepares claims for the kubelet. It imports gRPC, and is loaded
only if dra is set. Prepare comes before there is a sandbox, and attaches nothing: sandbox.py attaches.
"""

import cni.agent.deviceplugin  # noqa: F401 - it sets what gRPC reads when it is loaded
