"""vmtap-launch: from an attachment to a QEMU that holds its fds and nothing else.

Runs once for each VM, as root for some milliseconds. Must not change an attachment, and must leave nothing
on disk. Its own error codes stand here, beside spec.py's; `__main__` turns both into exit codes.
"""

from __future__ import annotations

NOT_PERMITTED = 120
QEMU_NOT_EXECUTABLE = 121
QEMU_NOT_FOUND = 122
NO_VHOST = 123
