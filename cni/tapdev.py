"""From a link to its verified character device and open fds (kernel: drivers/net/macvtap.c, tap.c, tun.c)."""

from __future__ import annotations


def open_queues(netns: int, record: object, queues: int) -> list[int]:
    raise NotImplementedError
