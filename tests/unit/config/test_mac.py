"""mac.py: stable where the VM is the same, different where it is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.config import mac, schema
from cni.state.launcher_pod import vm_name


def _of(
    pod: str,
    *,
    container: str = "c1",
    network: str = "wire",
    namespace: str = "default",
    ifname: str = "net1",
    seed: str = "",
    prefix: str = "",
) -> str:
    args = {"K8S_POD_NAME": pod, "K8S_POD_NAMESPACE": namespace}
    return mac.derive(mac.Derivation(seed, prefix), network, container, ifname, args)


@given(
    st.text(),
    st.text(),
    st.text(),
    st.dictionaries(st.sampled_from(["K8S_POD_NAME", "K8S_POD_NAMESPACE"]), st.text()),
)
def test_always_local_and_unicast(network: str, container: str, ifname: str, args: dict[str, str]) -> None:
    first = int(mac.derive(mac.PLAIN, network, container, ifname, args).split(":")[0], 16)
    assert first & 0b11 == 0b10


def test_a_vm_keeps_it_from_pod_to_pod() -> None:
    assert _of("virt-launcher-db-x7k2p", container="c1") == _of("virt-launcher-db-9qwez", container="c2")


def test_whatever_makes_it_another_interface_makes_it_another_address() -> None:
    base = _of("virt-launcher-db-x7k2p")
    others = {
        _of("virt-launcher-web-x7k2p"),
        _of("virt-launcher-db-x7k2p", seed="other"),
        _of("virt-launcher-db-x7k2p", namespace="other"),
        _of("virt-launcher-db-x7k2p", ifname="net2"),
        _of("db"),
        _of("virt-launcher-db"),
        _of("virt-launcher-db-longer"),
        mac.derive(mac.PLAIN, "wire", "c1", "net1", {}),
    }
    assert len(others | {base}) == 9


def test_a_vm_keeps_it_on_another_network() -> None:
    """KubeVirt's live update of the NAD reference changes the network, and not the pod's interface name."""
    assert _of("virt-launcher-db-x7k2p", network="other") == _of("virt-launcher-db-x7k2p")


def _generated(vm: str, suffix: str) -> str:
    """The pod's name as the API server makes it (k8s.io/apiserver, pkg/storage/names)."""
    return f"virt-launcher-{vm}-"[:58] + suffix


@pytest.mark.parametrize("length", range(1, 64))
def test_a_vm_with_a_name_of_any_length_keeps_it(length: int) -> None:
    name = ("db" + "x" * 61)[:length]
    assert _of(_generated(name, "x7k2p")) == _of(_generated(name, "9qwez"))
    assert vm_name(_generated(name, "x7k2p")) == name[:44]


def test_vms_whose_names_differ_after_44_characters_have_one_address() -> None:
    """The pod's name does not have the difference; docs/kubevirt.md names macAddress as the way out."""
    same = "x" * 44
    assert _of(_generated(f"{same}a", "x7k2p")) == _of(_generated(f"{same}b", "x7k2p"))
    assert _of(_generated("x" * 43 + "a", "x7k2p")) != _of(_generated("x" * 43 + "b", "x7k2p"))


def test_a_dash_where_a_name_is_cut_is_lost() -> None:
    """The API server's dash and one of the VM's name look alike there, and nowhere else."""
    assert _of(_generated("x" * 43, "x7k2p")) == _of(_generated("x" * 43 + "-b", "x7k2p"))
    assert _of(_generated("x" * 42, "x7k2p")) != _of(_generated("x" * 42 + "-b", "x7k2p"))


@pytest.mark.parametrize(
    "pod", ["virt-launcher-", "virt-launcher-x7k2p", "virt-launcher-db-X7K2P", "web-x7k2p", ""]
)
def test_other_pods_have_no_vm(pod: str) -> None:
    assert vm_name(pod) is None


def test_a_seed_makes_clusters_differ_and_nodes_agree() -> None:
    pod = "virt-launcher-db-x7k2p"
    assert _of(pod, seed="a") == _of(pod, seed="a", container="c9")
    assert len({_of(pod), _of(pod, seed="a"), _of(pod, seed="b")}) == 3


def test_a_prefix_is_kept_and_the_rest_tells_vms_apart() -> None:
    one, other = (
        _of(f"virt-launcher-{vm}-x7k2p", prefix=mac.with_colons("02-AB-cd")) for vm in ("db", "web")
    )
    assert one.startswith("02:ab:cd:")
    assert other.startswith("02:ab:cd:")
    assert one != other


def test_a_pod_that_is_no_launcher_keeps_it_by_its_own_name() -> None:
    assert _of("web-0", container="c1") == _of("web-0", container="c2")


def test_without_kubernetes_the_container_counts() -> None:
    assert mac.derive(mac.PLAIN, "wire", "c1", "net1", {}) != mac.derive(mac.PLAIN, "wire", "c2", "net1", {})


@given(st.binary(min_size=6, max_size=6).map(lambda raw: bytes([raw[0] & 0xFE, *raw[1:]]).hex(":")))
def test_a_plain_taps_own_address_is_another_unicast_one(guest: str) -> None:
    own = mac.of_plain_tap(guest)
    assert own != guest
    assert not int(own[:2], 16) & 1


@pytest.mark.parametrize(
    ("document", "address", "derived", "why"),
    [
        ({}, "02:00:00:00:00:01", False, None),
        ({"deny": ["02:00:00:00:00:01"]}, "02:00:00:00:00:01", False, "deny"),
        ({"deny": ["02:00:00:00:00:01"]}, "02:00:00:00:00:01", True, "deny"),
        ({"deny": ["02:00:00:00:00:01"]}, "02:00:00:00:00:02", False, None),
        ({"deny": ["02:AB"]}, "02:ab:ff:ff:ff:ff", False, "deny"),
        ({"deny": ["02:AB"]}, "02:ac:00:00:00:00", False, None),
        ({"deny": ["02:00:00:00:00:10-02:00:00:00:00:1F"]}, "02:00:00:00:00:1f", False, "deny"),
        ({"deny": ["02:00:00:00:00:10-02:00:00:00:00:1F"]}, "02:00:00:00:00:20", False, None),
        ({"deny": ["02-00-00-00-00-10-0200.0000.001F"]}, "02:00:00:00:00:1f", False, "deny"),
        ({"deny": ["0200.0000.0010-02:00:00:00:00:1f"]}, "02:00:00:00:00:20", False, None),
        ({"deny": ["02-AB-CD"]}, "02:ab:cd:ff:ff:ff", False, "deny"),
        ({"deny": ["0200.0000.00AB"]}, "02:00:00:00:00:ab", False, "deny"),
        ({"deny": ["0200.0000.00AB"]}, "02:00:00:00:00:ac", False, None),
        ({"allow": ["52:54:00"]}, "52:54:00:00:00:01", False, None),
        ({"allow": ["52:54:00"]}, "52:54:01:00:00:01", True, "52:54:00:00:00:00-52:54:00:ff:ff:ff"),
        ({"allow": ["52:54:00"], "deny": ["52:54:00:00"]}, "52:54:00:00:00:01", False, "deny"),
        ({"allow": None, "deny": None}, "52:54:00:00:00:01", False, None),
        ({"derivedOnly": True}, "52:54:00:00:00:01", False, "derivedOnly"),
        ({"derivedOnly": True}, "52:54:00:00:00:01", True, None),
    ],
)
def test_which_macs_a_policy_permits(
    document: dict[str, Any], address: str, derived: bool, why: str | None
) -> None:
    assert schema.accepts(schema.load("policy")["properties"]["mac"], document)
    found = mac.rules(document).refusal(address, derived=derived)
    assert (why in found) if why and found else found == why
