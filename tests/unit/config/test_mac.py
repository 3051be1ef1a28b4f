"""mac.py: stable where the VM is the same, different where it is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cni.config import mac


def _of(
    pod: str,
    *,
    container: str = "c1",
    network: str = "wire",
    namespace: str = "default",
    ifname: str = "net1",
) -> str:
    return mac.derive(network, container, ifname, {"K8S_POD_NAME": pod, "K8S_POD_NAMESPACE": namespace})


@given(
    st.text(),
    st.text(),
    st.text(),
    st.dictionaries(st.sampled_from(["K8S_POD_NAME", "K8S_POD_NAMESPACE"]), st.text()),
)
def test_always_local_and_unicast(network: str, container: str, ifname: str, args: dict[str, str]) -> None:
    first = int(mac.derive(network, container, ifname, args).split(":")[0], 16)
    assert first & 0b11 == 0b10


def test_a_vm_keeps_it_from_pod_to_pod() -> None:
    assert _of("virt-launcher-db-x7k2p", container="c1") == _of("virt-launcher-db-9qwez", container="c2")


def test_whatever_makes_it_another_interface_makes_it_another_address() -> None:
    base = _of("virt-launcher-db-x7k2p")
    others = {
        _of("virt-launcher-web-x7k2p"),
        _of("virt-launcher-db-x7k2p", network="other"),
        _of("virt-launcher-db-x7k2p", namespace="other"),
        _of("virt-launcher-db-x7k2p", ifname="net2"),
        _of("db"),
        _of("virt-launcher-db"),
        _of("virt-launcher-db-longer"),
        mac.derive("wire", "c1", "net1", {}),
    }
    assert len(others | {base}) == 9


def test_a_pod_that_is_no_launcher_keeps_it_by_its_own_name() -> None:
    assert _of("web-0", container="c1") == _of("web-0", container="c2")


def test_without_kubernetes_the_container_counts() -> None:
    assert mac.derive("wire", "c1", "net1", {}) != mac.derive("wire", "c2", "net1", {})


@given(st.binary(min_size=6, max_size=6).map(lambda raw: bytes([raw[0] & 0xFE, *raw[1:]]).hex(":")))
def test_a_plain_taps_own_address_is_another_unicast_one(guest: str) -> None:
    own = mac.of_plain_tap(guest)
    assert own != guest
    assert not int(own[:2], 16) & 1
