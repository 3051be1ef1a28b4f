"""launcher_pod.py: which names are those of KubeVirt's launcher pods."""

from __future__ import annotations

import pytest

from cni.state.launcher_pod import vm_name


@pytest.mark.parametrize(
    ("pod", "vm"),
    [
        ("virt-launcher-db-x7k2p", "db"),
        ("virt-launcher-my-db-x7k2p", "my-db"),
        ("virt-launcher-db", None),
        ("virt-launcher-db-longer", None),
        ("virt-launcher-x7k2p", None),
        ("virt-launcher--x7k2p", None),
        ("my-virt-launcher-db-x7k2p", None),
        ("web-0", None),
        ("", None),
    ],
)
def test_the_vm_of_a_pod(pod: str, vm: str | None) -> None:
    assert vm_name(pod) == vm
