"""The one error type. Raised anywhere, rendered only by plugin.py (as CNI JSON) and the launcher (as one line)."""

from __future__ import annotations

import errno

from cni.spec import IO_FAILURE, TRY_AGAIN_LATER

SHORTAGE = (errno.ENOBUFS, errno.EAGAIN, errno.ENOMEM)
"""What the kernel says when it has no room now, and may have later."""


class CniError(Exception):
    """An operation that failed, in the shape of SPEC section 5 "Error".

    code: one of spec.py; msg: one line that names the field or object and says what to do;
    details: what the kernel or a delegate said, for the person who has to find out why ("" if nothing).
    """

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details

    def __str__(self) -> str:
        return f"{self.msg} ({self.details})" if self.details else self.msg


def refused(error: OSError, msg: str) -> CniError:
    """The error for what a system call said: 11 if it may succeed later, else 5."""
    code = TRY_AGAIN_LATER if error.errno in SHORTAGE else IO_FAILURE
    return CniError(code, msg, str(error))
