"""A launcher's request, from bytes to what it is given; tests/agent/ has the rest."""

from __future__ import annotations

import pytest

from cni.agent.broker import LauncherRequest, choose, parse
from cni.errors import CniError
from cni.spec import INVALID_ENVIRONMENT, NO_ATTACHMENT
from tests.unit.launcher.attached import record

RECORDS = [record(ifname="net1", queues=2), record(ifname="net2", queues=4)]


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        (b"{}\n", LauncherRequest()),
        (
            b'{"ifnames":["net2"],"queues":3,"shared":true,"open":false}\n',
            LauncherRequest(("net2",), 3, True, False),
        ),
        (b'{"ifnames": []}\n', LauncherRequest()),
    ],
)
def test_requests(line: bytes, asked: LauncherRequest) -> None:
    assert parse(line) == asked


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (LauncherRequest(), [("net1", 2), ("net2", 4)]),
        (LauncherRequest(queues=1), [("net1", 1), ("net2", 1)]),
        (LauncherRequest(("net2", "net1")), [("net2", 4), ("net1", 2)]),
    ],
)
def test_what_is_asked_for_in_its_order(asked: LauncherRequest, chosen: list[tuple[str, int]]) -> None:
    assert [(each.ifname, queues) for each, queues in choose(RECORDS, asked)] == chosen


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        (LauncherRequest(queues=3), INVALID_ENVIRONMENT, "net1 has 2"),
        (LauncherRequest(("net3",)), NO_ATTACHMENT, "there is net1, net2"),
    ],
)
def test_what_is_not_there(asked: LauncherRequest, code: int, says: str) -> None:
    with pytest.raises(CniError, match=says) as caught:
        choose(RECORDS, asked)
    assert caught.value.code == code


def test_no_more_fds_than_a_message_can_carry() -> None:
    with pytest.raises(CniError, match="more than 253 queues"):
        choose([record(ifname="net1", queues=256)], LauncherRequest())
