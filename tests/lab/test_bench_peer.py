"""The benchmark's path to kubevirt/macvtap-cni: its real code, with a stand-in for the program."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lab.assets.cache import CHECKOUT, build
from lab.bench import node
from lab.bench.contenders import PEER, Floor, Place, macvtap_cni
from lab.bench.spawn import Spawner
from lab.bench.xxhash import xxh64
from lab.process import LabError
from lab.wire import Lab
from tests.lab.macvtap_cni import install

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.bench.contenders import Contender


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        ("", 0xEF46DB3751D8E999),
        ("a", 0xD24EC4F1A98C6E5B),
        ("abcd", 0xDE0327B0D25D92CC),
        ("abcdefgh", 0x3AD351775B4634B7),
        ("pod-0001Mvp0", 0x64F882505FEC61C3),
        ("abcdefghijklmnopqrstuvwxyz01234", 0x16058C7B947DA137),
    ],
)
def test_xxh64(data: str, digest: int) -> None:
    """The digests are those of the reference implementation."""
    assert xxh64(data.encode()) == digest


def test_xxh64_of_a_long_input() -> None:
    with pytest.raises(ValueError, match="below 32 bytes"):
        xxh64(bytes(32))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def spawner(lab: Lab, tmp_path: Path) -> Iterator[Spawner]:
    build(["musl-gcc", "-static", "-o", tmp_path / "spawn", CHECKOUT / "lab/bench/spawn.c"])
    with Spawner(tmp_path / "spawn", lab.node) as spawner:
        yield spawner


def test_the_peer_is_measured(lab: Lab, spawner: Spawner, tmp_path: Path) -> None:
    pod = lab.pod()
    before = set(lab.node.links())
    with Floor(lab.node, pod) as floor:
        peer = macvtap_cni(install(tmp_path), floor)
        samples = node.one_by_one(spawner, {PEER: peer}, floor, pod, 2)
        assert [len(samples[PEER][command]) for command in node.COMMANDS] == [2, 2]
        assert all(sample.wall > 0 for sample in samples[PEER]["ADD"])
        peer.call(spawner, "ADD", [Place(pod.path, "bench-peer", "net7")])
        assert "net7" in pod.links()
        peer.call(spawner, "DEL", [Place(pod.path, "bench-peer", "net7")])
    assert set(pod.links()) == {"lo"}
    assert set(lab.node.links()) == before


def test_what_a_failed_call_wrote_is_reported(lab: Lab, spawner: Spawner, tmp_path: Path) -> None:
    pod = lab.pod()
    place = Place(pod.path, "bench-peer")
    with Floor(lab.node, pod) as floor:
        peer = macvtap_cni(install(tmp_path), floor)
        newer = replace(peer, config={**peer.config, "cniVersion": "1.0.0"})
        with pytest.raises(LabError, match=r"DEL ended with status 1: .*incompatible CNI versions"):
            newer.call(spawner, "DEL", [place])
        assert _complaint(spawner, peer, place, "#!/bin/sh\necho it broke >&2\nexit 69\n").endswith(
            "ended with status 69: it broke"
        )
        # Nothing of an earlier run is quoted, and a long text is cut.
        long = _complaint(
            spawner, peer, place, "#!/bin/sh\nhead -c 99999 /dev/zero | tr '\\0' x >&2\nexit 1\n"
        )
        assert "broke" not in long
        assert 1000 < len(long) < 9999


def _complaint(spawner: Spawner, peer: Contender, place: Place, script: str) -> str:
    peer.program.write_text(script)
    with pytest.raises(LabError) as caught:
        peer.call(spawner, "DEL", [place])
    return str(caught.value)
