"""Which messages a filter lets through."""

from __future__ import annotations

import socket

import pytest

from cni.kernel import bpf

MESSAGES = [b"abcdef", b"abcdeX", b"abXdef", b"XXcdef", b"ab", b""]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ([], MESSAGES),
        ([(0, b"ab")], [b"abcdef", b"abcdeX", b"abXdef", b"ab"]),
        ([(2, b"cdef")], [b"abcdef", b"XXcdef"]),
        ([(0, b"ab"), (2, b"cdef")], [b"abcdef"]),
        ([(0, b"ab"), (2, b"cd"), (4, b"eX")], [b"abcdeX"]),
    ],
)
def test_only_messages_with_every_field_are_received(
    fields: list[tuple[int, bytes]], kept: list[bytes]
) -> None:
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, receiver:
        bpf.keep_only(receiver, *fields)
        receiver.setblocking(False)
        for message in MESSAGES:
            sender.send(message)
        received = [receiver.recv(64) for _ in kept]
        assert received == kept
        with pytest.raises(BlockingIOError):
            receiver.recv(64)
