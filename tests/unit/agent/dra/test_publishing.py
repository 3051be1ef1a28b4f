"""publishing.py: slices are written when they are not as wanted, and only then."""

from __future__ import annotations

from typing import Any

import pytest

from cni.agent.dra.publishing import Publishing
from cni.agent.dra.slices import SEVERAL
from cni.errors import CniError
from tests.unit.agent.dra.standin import StandIn

NODE = "worker-1"


def devices(count: int, mtu: int = 1500) -> list[dict[str, Any]]:
    return [{"name": f"data-{number}", "attributes": {"mtu": {"int": mtu}}} for number in range(count)]


@pytest.fixture
def api() -> StandIn:
    return StandIn()


def pools(api: StandIn) -> set[tuple[int, int]]:
    """(generation, resourceSliceCount) of the slices."""
    pools = [each["spec"]["pool"] for each in api.slices.values()]
    return {(each["generation"], each["resourceSliceCount"]) for each in pools}


def test_a_slice_has_128_devices(api: StandIn) -> None:
    assert Publishing(api, NODE).publish(devices(300))
    assert [len(each["spec"]["devices"]) for each in api.slices.values()] == [128, 128, 44]
    assert pools(api) == {(1, 3)}
    spec = api.slices[f"{NODE}-vmtap.dev-0"]["spec"]
    assert (spec["driver"], spec["nodeName"], spec["pool"]["name"]) == ("vmtap.dev", NODE, NODE)
    [owner] = api.slices[f"{NODE}-vmtap.dev-0"]["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Node", NODE, f"uid of {NODE}")


def test_what_is_as_wanted_is_not_written(api: StandIn) -> None:
    for publishing in (Publishing(api, NODE), Publishing(api, NODE)):  # the second as after a restart
        publishing.publish(devices(3))
    writes = [call for call in api.calls if call[0] != "GET"]
    assert not Publishing(api, NODE).publish(devices(3))
    assert [call for call in api.calls if call[0] != "GET"] == writes
    assert len(writes) == 1


def test_a_change_is_a_new_generation_of_every_slice(api: StandIn) -> None:
    publishing = Publishing(api, NODE)
    publishing.publish(devices(130))
    assert publishing.publish(devices(130, mtu=9000))
    assert pools(api) == {(2, 2)}
    assert publishing.publish(devices(1, mtu=9000))
    assert pools(api) == {(3, 1)}
    assert list(api.slices) == [f"{NODE}-vmtap.dev-0"]
    assert publishing.publish([])  # the driver is there, without devices
    assert pools(api) == {(4, 1)}


def test_a_wiped_or_foreign_change_is_made_good(api: StandIn) -> None:
    publishing = Publishing(api, NODE)
    publishing.publish(devices(130))
    wanted = {name: each["spec"]["devices"] for name, each in api.slices.items()}
    del api.slices[f"{NODE}-vmtap.dev-1"]
    assert publishing.publish(devices(130))
    api.slices[f"{NODE}-vmtap.dev-0"]["spec"]["devices"] = []
    assert publishing.publish(devices(130))
    assert {name: each["spec"]["devices"] for name, each in api.slices.items()} == wanted
    api.slices.clear()
    assert publishing.publish(devices(130))
    assert not publishing.publish(devices(130))


def test_a_server_that_drops_a_field_is_written_to_once(api: StandIn) -> None:
    api.drops = {"taints"}
    wanted = [each | {"taints": []} for each in devices(2)]
    publishing = Publishing(api, NODE)
    assert publishing.publish(wanted)
    assert not publishing.publish(wanted)
    again = Publishing(api, NODE)  # a restarted agent does not know yet what the server makes of it
    assert again.publish(wanted)
    assert not again.publish(wanted)


def test_a_refusal_names_the_slice_and_the_remedy(api: StandIn) -> None:
    api.status = 403
    with pytest.raises(CniError, match=r"ResourceSlice worker-1-vmtap.dev-0: .* docs/dra.md"):
        Publishing(api, NODE).publish(devices(1))


def test_names_are_short_enough(api: StandIn) -> None:
    nodes = ("a" * 252 + "b", "a" * 252 + "c")
    for node in nodes:
        Publishing(api, node).publish([])
        api.slices = {
            name: each | {"spec": each["spec"] | {"devices": []}} for name, each in api.slices.items()
        }
    names = {each["metadata"]["name"] for each in api.bodies}
    assert len(names) == 2
    assert max(map(len, names)) <= 253


@pytest.mark.parametrize("drops", [set(), {SEVERAL}])
def test_what_the_server_would_store_is_found_out_without_a_change(api: StandIn, drops: set[str]) -> None:
    api.drops = drops
    publishing = Publishing(api, NODE)
    assert not publishing.shares
    publishing.ask()
    assert publishing.shares is not bool(drops)
    assert api.slices == {}


def test_a_server_that_loses_the_feature(api: StandIn) -> None:
    publishing = Publishing(api, NODE)
    publishing.ask()
    several = [{**each, SEVERAL: True} for each in devices(1)]
    publishing.publish(several)
    assert publishing.shares
    api.drops = {SEVERAL}
    publishing.publish([*several, *devices(1)])
    assert not publishing.shares
