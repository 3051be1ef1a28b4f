"""vmtap-launch: starts QEMU with the open fds of a pod's attachments and without privileges.

Runs once for each VM, as root for some milliseconds. Must not change an attachment or write to disk. The launcher's own
error codes are here, those of the plugin in cni/spec.py; cni/launcher/__main__.py maps both to exit codes.
"""

from __future__ import annotations

NOT_PERMITTED = 120
QEMU_NOT_EXECUTABLE = 121
QEMU_NOT_FOUND = 122
NO_VHOST = 123
