"""The one error type. Any module raises it; plugin.py renders it as CNI JSON, the launcher as one line."""

from __future__ import annotations

import errno

from cni.names import escaped
from cni.spec import IO_FAILURE, TRY_AGAIN_LATER

_MSG, _DETAILS = 1000, 2000
"""Characters of msg and details: a request may bring in megabytes, and they go to the runtime and to the log."""

SHORTAGE = (errno.ENOBUFS, errno.EAGAIN, errno.ENOMEM)
"""Errors of a kernel that has no memory or buffer now, and may have one later."""


class CniError(Exception):
    """An operation that failed, in the shape of SPEC section 5 "Error".

    code: one of spec.py; msg: one line that names the field or object and the next step;
    details: the message of the kernel or of a delegate, for the person who looks for the cause; "" if there is none.
    Both are cut to a bounded length, and unprintable characters in them are escaped.
    """

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        self.code = code
        self.msg = escaped(cut(msg, _MSG))
        self.details = escaped(cut(details, _DETAILS))
        super().__init__(self.msg)

    def __str__(self) -> str:
        return f"{self.msg} ({self.details})" if self.details else self.msg


def refused(error: OSError, msg: str) -> CniError:
    """The CniError for a system call that failed: 11 if it may succeed later, else 5."""
    code = TRY_AGAIN_LATER if error.errno in SHORTAGE else IO_FAILURE
    return CniError(code, msg, reason(error))


def reason(error: Exception) -> str:
    """What the exception reports, in words for a person: without numbers of errors, codecs and names of classes."""
    text = str(error)
    match error:
        case OSError(strerror=str(why)):
            path = error.filename
            text = f"{why}: {path}" if isinstance(path, str) and path not in why else why
        case UnicodeDecodeError():
            text = f"byte {error.start} is not UTF-8"
        case RecursionError():
            text = "nested too deeply"
        case KeyError(args=(key,)):
            text = f"{key} is missing"
        case ValueError() if line := getattr(error, "lineno", None):  # json.JSONDecodeError
            text = f"{vars(error)['msg']}, line {line}, column {vars(error)['colno']}"
        case ValueError() if "sys.set_int_max_str_digits" in text:
            text = "a number has too many digits"
    return text


def cut(text: str, most: int) -> str:
    """The text; of a longer one than `most` characters, its beginning and "…"."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
