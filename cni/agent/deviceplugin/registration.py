"""One attempt to register a resource with the kubelet. Must not wait: the answer comes in a thread of gRPC's."""

from __future__ import annotations

import os

import grpc

from cni.agent.deviceplugin import v1beta1_pb2 as api
from cni.agent.deviceplugin import v1beta1_pb2_grpc as services
from cni.agent.deviceplugin.serving import OPTIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.agent.deviceplugin.serving import Resource

_SECONDS = 15.0
"""The kubelet connects to our socket before it answers."""
_CHANNEL = (("grpc.enable_http_proxy", 0), ("grpc.default_authority", "localhost"))
"""A proxy is no way to a unix socket, and a path no authority that every kubelet's HTTP/2 takes."""


class Registration:
    """Begun when it is made; answered(self) is called when error says how it ended, and close() ends it in any case."""

    def __init__(
        self, kubelet: str, interface: str, resource: Resource, answered: Callable[[Registration], None]
    ) -> None:
        self.interface = interface
        self.error = ""
        """Why not, in one line; "" if the kubelet has taken it."""
        self._answered = answered
        self._channel = grpc.insecure_channel(f"unix:{kubelet}", options=_CHANNEL)
        request = api.RegisterRequest(
            version="v1beta1",
            endpoint=os.path.basename(resource.path),
            resource_name=resource.name,
            options=OPTIONS,
        )
        asked = services.RegistrationStub(self._channel).Register.future(request, timeout=_SECONDS)
        asked.add_done_callback(self._done)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _done(self, answer: grpc.Call) -> None:
        code = answer.code()
        if code is not grpc.StatusCode.OK:
            self.error = f"the kubelet says {code.name}: {answer.details()}"
        self._answered(self)
