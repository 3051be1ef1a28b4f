"""Text from outside: which names are accepted, and how text that nobody has checked is printed.

Unprintable is what a terminal obeys or does not show: control characters (C0, DEL, C1), line ends, bidirectional and
other format characters, spaces but U+0020, surrogates, unassigned characters, and letters and marks without a shape.
Must not import anything of the project.
"""

from __future__ import annotations

import re

IFNAME_BYTES = 15
_NOT_IN_IFNAME = re.compile(r"[/:%\s]")
"""The kernel takes a name with % for a pattern (dev_alloc_name)."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_SHAPELESS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Not shown, and printable to str.isprintable(): Unicode's Default_Ignorable_Code_Point, and the blank Braille cell."""
_SHORT = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}


def printable(text: str) -> bool:
    """Whether the text has no unprintable character."""
    return text.isprintable() and (text.isascii() or not _SHAPELESS.search(text))


def escaped(text: str, kept: str = "") -> str:
    r"""The text with each unprintable character as its JSON escape, such as \u001b, but for the characters in kept.

    JSON stays valid JSON of the same meaning.
    """
    if printable(text):
        return text
    return "".join(
        letter if letter in kept or printable(letter) else _SHORT.get(letter) or _escape(letter)
        for letter in text
    )


def is_id(text: str) -> bool:
    """Whether it may be the name of a network or the id of a container (SPEC sections 1 and 2)."""
    return _ID.fullmatch(text) is not None


def is_ifname(text: str) -> bool:
    """Whether it may be an attachment's ifname.

    The kernel (dev_valid_name) takes 1 to 15 bytes except ".", "..", '/', ':' and isspace(), of which 0xa0 is one.
    """
    if not printable(text) or text in (".", "..") or _NOT_IN_IFNAME.search(text):
        return False
    encoded = text.encode()
    return 0 < len(encoded) <= IFNAME_BYTES and b"\xa0" not in encoded


def _escape(letter: str) -> str:
    return re.sub("....", r"\\u\g<0>", letter.encode("utf-16-be", "surrogatepass").hex())
