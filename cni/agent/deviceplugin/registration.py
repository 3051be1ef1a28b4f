"""One attempt to register a resource with the kubelet. Must not block: the answer arrives in a gRPC thread."""

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
"""The kubelet connects to the resource's socket before it answers."""
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.default_authority", "localhost"))
"""No proxy, since the kubelet listens on a unix socket; and not the socket's path as authority: some kubelets reject
that as HTTP/2."""


class Registration:
    """Created, it sends; once error is set it calls answered(self). close() ends it in any case."""

    def __init__(
        self, kubelet: str, interface: str, resource: Resource, answered: Callable[[Registration], None]
    ) -> None:
        self.interface = interface
        self.error = ""
        """Why the registration failed, in one line; "" if the kubelet accepted it."""
        self._answered = answered
        self._channel = grpc.insecure_channel(f"unix:{kubelet}", options=CHANNEL_OPTIONS)
        request = api.RegisterRequest(
            version="v1beta1",
            endpoint=os.path.basename(resource.path),
            resource_name=resource.name,
            options=OPTIONS,
        )
        call = services.RegistrationStub(self._channel).Register.future(request, timeout=_SECONDS)
        call.add_done_callback(self._done)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _done(self, answer: grpc.Call) -> None:
        code = answer.code()
        if code is not grpc.StatusCode.OK:
            self.error = f"the kubelet answered {code.name}: {answer.details()}"
        self._answered(self)
