"""The command line, as strings: what QEMU makes of it is in test_main.py."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.launcher import qemu
from tests.unit.launcher.attached import MAC, record


def as_qemu_reads(text: str) -> list[str]:
    """Splits at single commas; a double one is a comma (util/qemu-option.c, get_opt_value)."""
    parts = re.split(r"(,,|,)", text)
    values = [""]
    for part in parts:
        if part == ",":
            values.append("")
        else:
            values[-1] += "," if part == ",," else part
    return values


def test_one_queue() -> None:
    assert qemu.command(["qemu", "-m", "64"], [(record(mtu=9000), 1)]) == [
        *("qemu", "-m", "64"),
        *("-netdev", "tap,id=vmtap0,fds=3"),
        *("-device", f"virtio-net-pci,netdev=vmtap0,mac={MAC},host_mtu=9000"),
    ]


def test_more_queues_have_vectors_for_all_and_two_more() -> None:
    command = qemu.command(["qemu"], [(record(), 3)])
    assert command[2] == "tap,id=vmtap0,fds=3:4:5"
    assert command[4].endswith(",host_mtu=1500,mq=on,vectors=8")


def test_numbers_go_by_attachment_then_vhost_then_seed_then_monitor() -> None:
    attachments = [(record(), 2), (record(ifname="net2"), 1)]
    command = qemu.command(["qemu"], attachments, vhost=True, seeded=True, supervised=True)
    assert command[2] == "tap,id=vmtap0,fds=3:4,vhost=on,vhostfds=5:6"
    assert command[6] == "tap,id=vmtap1,fds=7,vhost=on,vhostfds=8"
    assert "fd=9,set=9" in command
    assert "socket,id=vmtap-qmp,fd=10,server=off" in command
    assert "chardev=vmtap-qmp,mode=control" in command


@pytest.mark.parametrize("option", ["seeded", "supervised"])
def test_each_option_takes_the_first_free_number(option: str) -> None:
    command = qemu.command(["qemu"], [(record(), 1)], **{option: True})
    assert [number for argument in command[5:] for number in re.findall(r"\bfd=(\d+)", argument)] == ["4"]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(max_size=8), max_size=8), st.integers(1, 3))
def test_the_users_own_arguments_are_untouched_and_first(arguments: list[str], queues: int) -> None:
    users = ["qemu-system-x86_64", *arguments]
    assert qemu.command(users, [(record(), queues)], seeded=True)[: len(users)] == users


@settings(deadline=None)  # the machine may be busy
@given(st.dictionaries(st.from_regex(r"[a-z][a-z.-]*", fullmatch=True), st.text(), min_size=1))
def test_a_value_reaches_qemu_as_it_was(values: dict[str, str]) -> None:
    expected = [f"{key}={value}" for key, value in values.items()]
    assert as_qemu_reads(qemu.option("tap", values)) == ["tap", *expected]
    assert as_qemu_reads(qemu.option(None, values)) == expected
