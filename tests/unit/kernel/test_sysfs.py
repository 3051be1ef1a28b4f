"""sysfs.py: attributes of faked files, and of the loopback device of a network namespace."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cni.kernel import netns, sysfs

if TYPE_CHECKING:
    from pathlib import Path

    from lab.wire import Lab


@pytest.mark.parametrize(
    ("content", "text", "number"),
    [("7\n", "7", 7), ("-1\n", "-1", -1), ("up\n", "up", None), ("\n", "", None), ("--1\n", "--1", None)],
)
def test_an_attribute(tmp_path: Path, content: str, text: str, number: int | None) -> None:
    (tmp_path / "a").write_text(content)
    path = str(tmp_path / "a")
    assert (sysfs.attribute(path), sysfs.read(path), sysfs.read_number(path)) == (text, text, number)


def test_an_attribute_that_cannot_be_read(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        sysfs.attribute(path)
    assert (sysfs.read(path), sysfs.read_number(path)) == ("", None)


def test_a_mount_shows_the_links_of_its_namespace(lab: Lab) -> None:
    def names(links: sysfs.Sysfs) -> tuple[int | None, int | None]:
        return links.number("lo/ifindex"), links.number("node/ifindex")

    fd = netns.open_path(str(lab.switch.path))
    try:
        with sysfs.mounted(fd) as switch, sysfs.mounted() as own:
            assert names(switch)[0] == 1 and names(switch)[1] is not None
            assert names(own) == (1, None)
            assert own.target("lo/device/driver") is None
            with pytest.raises(FileNotFoundError):
                own.attribute("node/ifindex")
    finally:
        os.close(fd)
