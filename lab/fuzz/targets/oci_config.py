"""A container's config.json, which vmtap-hook sends to the agent: Container.read and Container.check."""

from __future__ import annotations

from cni.agent.dra.container import Container
from cni.errors import CniError
from cni.spec import DECODING_FAILURE, WRONG_DEVICE
from lab.fuzz import claims
from lab.fuzz.targets import Target


def run(data: bytes) -> None:
    """Read data; a container that it describes has a device at each path, or none."""
    try:
        container = Container.read(data)
    except CniError as error:
        claims.refused(error, [DECODING_FAILURE])
        return
    claims.printable(container.netns)
    assert (container.pod == "") == (not container.pods)
    for path, device in container.devices.items():
        container.check(path, device)
        try:
            container.check(path, (device[0], device[1] + 1))
        except CniError as error:
            claims.refused(error, [WRONG_DEVICE])
        else:
            raise AssertionError("another device was accepted")


TARGET = Target(
    run,
    words=(
        *("annotations", "linux", "namespaces", "devices", "network", "type", "path", "major", "minor"),
        *("io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"),
    ),
    json=True,
    most_bytes=1 << 14,
)
