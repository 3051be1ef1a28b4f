"""A client of a container runtime's CRI, version 1: pods, and containers in them, as a kubelet makes them.

lab/proto/cri.proto has the part of the API that is used. Must not know which runtime it is, nor what its pods do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from lab.process import PATIENCE, Closing, LabError, wait_for
from lab.proto import cri_pb2 as api
from lab.proto import cri_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_NAMESPACES = api.NamespaceOption(pid=api.CONTAINER)
"""A kubelet's default: each container has its own pid namespace, and the pod's network."""


class CriError(LabError):
    """The runtime returned an error; the text is the runtime's."""


@dataclass(frozen=True)
class Pod:
    """A sandbox, running or not."""

    id: str
    config: api.PodSandboxConfig


@dataclass(frozen=True)
class Container:
    """What a kubelet passes to the runtime of a container's part of a pod's spec."""

    image: str
    command: Sequence[str]
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[api.Mount] = ()
    devices: Sequence[api.Device] = ()
    cdi: Sequence[str] = ()
    """Qualified names of CDI devices."""
    user: int | None = None
    group: int | None = None
    drop: Sequence[str] = ()
    groups: Sequence[int] = ()
    no_new_privs: bool = False
    read_only: bool = False
    seccomp: bool = False
    """The runtime's default profile."""


class Cri(Closing):
    """A client; a context manager.

    socket: the runtime's, by a path of this process. cgroup: the parent of the pods' control groups. logs: the folder
    of the containers' output, by a path of the runtime: POD/CONTAINER.log.
    """

    def __init__(self, socket: Path, cgroup: str, logs: str) -> None:
        self._logs = logs
        self._cgroup = cgroup
        self._channel = grpc.insecure_channel(
            f"unix:{socket}",
            # A runtime that was killed is started again soon.
            options=[("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)],
        )
        self._runtime = cri_pb2_grpc.RuntimeServiceStub(self._channel)
        self._images = cri_pb2_grpc.ImageServiceStub(self._channel)

    def wait_ready(self, alive: Callable[[], bool]) -> None:
        """Returns when the runtime takes requests; LabError if it ends before that or takes too long."""
        failure = ""

        def answers() -> bool:
            nonlocal failure
            try:
                self._call("Version", api.VersionRequest())
            except CriError as error:  # it listens before it is initialised, and reports no event when it is
                failure = str(error)
                if not alive():
                    raise
                return False
            return True

        wait_for(answers, lambda: failure)

    def wait_image(self, name: str) -> None:
        """Waits until the runtime lists an image, which it does a moment after the import."""
        request = api.ImageStatusRequest(image=api.ImageSpec(image=name))
        wait_for(
            lambda: self._call("ImageStatus", request, self._images).HasField("image"),
            lambda: f"the runtime does not list the image {name}",
        )

    def run_pod(self, name: str, *, annotations: Mapping[str, str] | None = None, attempt: int = 0) -> Pod:
        """Makes a sandbox with its networks attached. Raises CriError, with the CNI plugin's error."""
        config = api.PodSandboxConfig(
            metadata=api.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="lab", attempt=attempt),
            hostname=name,
            log_directory=f"{self._logs}/{name}",
            annotations=annotations or {},
            linux=api.LinuxPodSandboxConfig(
                cgroup_parent=self._cgroup,
                security_context=api.LinuxSandboxSecurityContext(namespace_options=_NAMESPACES),
            ),
        )
        answer = self._call("RunPodSandbox", api.RunPodSandboxRequest(config=config))
        return Pod(answer.pod_sandbox_id, config)

    def pods(self) -> dict[str, bool]:
        """The sandbox's id → whether it is ready."""
        items = self._call("ListPodSandbox", api.ListPodSandboxRequest()).items
        return {each.id: each.state == api.SANDBOX_READY for each in items}

    def details(self, pod: Pod) -> dict[str, Any]:
        """The runtime's verbose status of the pod; containerd's has cniResult and runtimeSpec."""
        request = api.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
        known: dict[str, Any] = json.loads(self._call("PodSandboxStatus", request).info["info"])
        return known

    def stop_pod(self, pod: str) -> None:
        """Stops a pod's containers and detaches its networks; may be repeated. pod: its id."""
        self._call("StopPodSandbox", api.StopPodSandboxRequest(pod_sandbox_id=pod))

    def remove_pod(self, pod: str) -> None:
        """Stops and removes a pod. pod: its id."""
        self.stop_pod(pod)
        self._call("RemovePodSandbox", api.RemovePodSandboxRequest(pod_sandbox_id=pod))

    def create(self, pod: Pod, container: Container, name: str = "c") -> str:
        """Creates a container in the pod and returns its id."""
        context = api.LinuxContainerSecurityContext(
            capabilities=api.Capability(drop_capabilities=container.drop),
            namespace_options=_NAMESPACES,
            no_new_privs=container.no_new_privs,
            readonly_rootfs=container.read_only,
            supplemental_groups=container.groups,
        )
        if container.user is not None:
            context.run_as_user.value = container.user
        if container.group is not None:
            context.run_as_group.value = container.group
        profiles = api.SecurityProfile
        context.seccomp.profile_type = profiles.RuntimeDefault if container.seccomp else profiles.Unconfined
        config = api.ContainerConfig(
            metadata=api.ContainerMetadata(name=name),
            image=api.ImageSpec(image=container.image),
            command=container.command,
            args=container.args,
            envs=[api.KeyValue(key=key, value=value) for key, value in container.env.items()],
            mounts=container.mounts,
            devices=container.devices,
            CDI_devices=[api.CDIDevice(name=each) for each in container.cdi],
            log_path=f"{name}.log",
            linux=api.LinuxContainerConfig(security_context=context),
        )
        request = api.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        created: str = self._call("CreateContainer", request).container_id
        return created

    def start(self, container: str) -> None:
        self._call("StartContainer", api.StartContainerRequest(container_id=container))

    def run(self, pod: Pod, container: Container, name: str = "c") -> str:
        """Creates and starts a container, and returns its id."""
        made = self.create(pod, container, name)
        self.start(made)
        return made

    def status(self, container: str) -> api.ContainerStatus:
        status: api.ContainerStatus = self._call(
            "ContainerStatus", api.ContainerStatusRequest(container_id=container)
        ).status
        return status

    def exec(self, container: str, command: Sequence[str]) -> str:
        """Runs a command in a container and returns its output. Raises CriError if its status is not 0."""
        answer = self._call("ExecSync", api.ExecSyncRequest(container_id=container, cmd=command, timeout=30))
        if answer.exit_code != 0:
            output = (answer.stderr or answer.stdout).decode(errors="replace").strip()
            raise CriError(f"{command} in the container: status {answer.exit_code}: {output}")
        printed: str = answer.stdout.decode(errors="replace")
        return printed

    def remove(self, container: str) -> None:
        """Kills and removes a container, by its id."""
        self._call("StopContainer", api.StopContainerRequest(container_id=container, timeout=0))
        self._call("RemoveContainer", api.RemoveContainerRequest(container_id=container))

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, request: Any, service: Any = None) -> Any:
        try:
            return getattr(service or self._runtime, method)(request, timeout=PATIENCE)
        except grpc.RpcError as error:
            raise CriError(f"{method}: {error.details()}") from error
