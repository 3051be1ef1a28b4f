"""Device ids: the arithmetic that Allocate and ADD share."""

from __future__ import annotations

import pytest

from cni.state import deviceid
from cni.state.store import IFINDEX_BASE, IFINDEX_SPAN


@pytest.mark.parametrize(
    ("device_id", "parsed"),
    [
        ("dataplaneMvp0", ("dataplane", 0)),
        ("dataplaneMvp4095", ("dataplane", 4095)),
        ("aMvp1Mvp2", ("aMvp1", 2)),
        ("dataplaneMvp4096", None),
        ("dataplaneMvp07", None),  # one device must not have two ids
        ("dataplaneMvp-1", None),
        ("dataplaneMvp1\n", None),
        ("Mvp1", None),
        ("0000:3b:00.1", None),
        ("", None),
    ],
)
def test_parse(device_id: str, parsed: tuple[str, int] | None) -> None:
    assert deviceid.parse(device_id) == parsed
    if parsed:
        assert deviceid.format(*parsed) == device_id
        assert deviceid.index_of(device_id) == deviceid.ifindex(*parsed)
    else:
        assert deviceid.index_of(device_id) == 0


def test_each_device_has_an_index_of_its_own() -> None:
    found = {
        deviceid.ifindex(name, number) for name in ("a", "b", "x" * 50) for number in range(deviceid.MOST)
    }
    assert len(found) == 3 * deviceid.MOST
    # The kernel's are positive int32, and those of attachments without a device are below.
    assert IFINDEX_BASE + IFINDEX_SPAN == deviceid.BASE
    assert all(deviceid.BASE <= index < 1 << 31 for index in found)


def test_it_stays_what_it_is() -> None:
    """A kubelet remembers the path that Allocate answered, through an upgrade of ours and a reboot."""
    assert deviceid.ifindex("dataplane", 7) == 0x72785007
