"""An agent that offers devices to a kubelet, a stand-in for that kubelet, and the contender that has a device of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lab.assets.programs import BENCH
from lab.bench.contenders import AGENT_DEVICE, TMPFS, Agent, Contender
from lab.kubernetes.kubelet import Kubelet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Netns

_RESOURCE = "macvtap.network.kubevirt.io/wire"
_DEVICE = "wireMvp0"
_POD = ("bench", "vm")


@contextlib.contextmanager
def agent_with_devices(node: Netns) -> Iterator[Contender]:
    """The contender AGENT_DEVICE: each ADD has the agent ask the kubelet whose device it is."""
    with contextlib.ExitStack() as stack:
        prefix = f"vmtap-bench-{os.getpid()}-"
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=TMPFS)))
        kubelet = stack.enter_context(Kubelet(folder / "kubelet/device-plugins"))
        agent = stack.enter_context(Agent(node, ["--device-plugin", "--kubelet", str(kubelet.folder)]))
        kubelet.wait_resource(_RESOURCE)
        kubelet.allocate(_RESOURCE, [_DEVICE], pod=_POD)
        env = {
            "VMTAP_RUN": str(agent.run),
            "CNI_ARGS": f"K8S_POD_NAMESPACE={_POD[0]};K8S_POD_NAME={_POD[1]}",
        }
        config = {"type": "vmtap", "device": "macvtap", "mode": "bridge", "deviceID": _DEVICE}
        yield Contender(AGENT_DEVICE, BENCH.get() / "vmtap", config, env, agent)
