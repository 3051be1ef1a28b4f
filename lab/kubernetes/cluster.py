"""A Kubernetes of one node: the real API server, controllers, scheduler, etcd, kubelet, containerd and runc, by hand.

It runs on a machine of the lab (lab/runtimes/machine.py): nothing of it outlives that, and nothing of the host is
touched. There is no registry: images are imported. There is no proxy and no DNS: a pod is reached by its address. Must
not know what runs in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from typing import TYPE_CHECKING, Any

from lab.assets.programs import CLUSTER, MANIFESTS
from lab.kubernetes.client import KUBECTL_PAUSE, Client
from lab.process import PATIENCE, LabError, Program, wait_for
from lab.runtimes.containerd import SANDBOX, SOCKET, Containerd
from lab.runtimes.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lab.process import Word
    from lab.wire import Lab

NODE = "node"
"""The node's name in Kubernetes."""
ADDRESS = "10.78.0.2"
BUSYBOX = SANDBOX
"""An image with a shell, for pods."""
NETCONF = "/etc/cni/net.d"
PLUGINS = "/opt/cni/bin"
"""On the node. It has the reference plugins loopback, bridge and host-local."""
_BRIDGE = "cni0"
_HOME = "/run/lab/cluster"
"""The folder, on the node, of the programs' configs and data."""
_SERVER = f"https://{ADDRESS}"
_SERVICE = "10.96.0.1"
"""The address at which pods reach the API server. It is one of the node's, because there is no proxy."""
_CERTIFICATE = f"{_HOME}/tls/apiserver.crt"

# Folders that the programs write to are the host's under overlays. Mounts are shared, as on a host with systemd. Files
# of /proc/sys that a kubelet sets are covered by files with its values: the host's kernel is not changed.
_PREPARE = """
mount --make-rshared /
for name in etc opt var/log; do
    mkdir -p /run/lab/$name/upper /run/lab/$name/work
    mount -t overlay -o lowerdir=/$name,upperdir=/run/lab/$name/upper,workdir=/run/lab/$name/work none /$name
done
mkdir -p {home}/tuned {netconf} {plugins} /run/netns
rm -rf {netconf}/* {plugins}/* /var/lib/kubelet /var/lib/cni /var/log/pods /var/log/containers
cp {cni}/* {plugins}
while read -r name value; do
    echo "$value" >{home}/tuned/value
    mv {home}/tuned/value {home}/tuned/${{name##*/}}
    mount --bind {home}/tuned/${{name##*/}} /proc/sys/$name
done <<EOF
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
EOF
openssl genrsa -out {home}/accounts.key 2048
"""

_USERS = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
}
_PODS_NETWORK = {
    "type": "bridge",
    "bridge": _BRIDGE,
    "isDefaultGateway": True,
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]]},
}


class Cluster(Client):
    """A started cluster whose node is Ready; a context manager, to be closed before its lab.

    folder: for logs, on the host. The node has eth0 for the cluster beside the lab's NICs. A pod's first network is a
    bridge; each further config in NETCONF is attached, too, in the order of the names.
    """

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.programs = CLUSTER.get()
        self._folder = folder
        with contextlib.ExitStack() as stack:
            self.machine = stack.enter_context(Machine(lab.node))
            self._path = f"{self.programs}:{MANIFESTS.get()}:{os.environ['PATH']}"
            self._env = {"PATH": self._path, "HOME": "/root"}
            self._prepare()
            self.kubelet = self._program("kubelet", f"--config={_HOME}/kubelet.yaml", *_kubelet_flags())
            self._start(stack)
            self._stack = stack.pop_all()

    def story(self) -> str:
        """The pods and the last events, for an error message."""
        ended = [each.tail() for each in (self.kubelet, self.containerd) if not each.alive()]
        return "\n".join([super().story(), *ended])

    def run(
        self,
        argv: Sequence[Word],
        *,
        stdin: str = "",
        check: bool = True,
        timeout: float = 2 * PATIENCE,
    ) -> str:
        """Runs a command on the node as the cluster's administrator and returns its output. Raises LabError."""
        return self.machine.run(
            argv, stdin=stdin, check=check, env=self.environment(), timeout=timeout
        ).stdout

    def environment(self) -> dict[str, str]:
        """The environment of commands on the node."""
        return {
            **os.environ,
            "PATH": self._path,
            "KUBECONFIG": f"{_HOME}/admin.kubeconfig",
            "KUBECACHEDIR": f"{_HOME}/kubectl",  # the host's may know another cluster at this address
            "CONTAINERD_ADDRESS": SOCKET,
            "CONTAINERD_NAMESPACE": "k8s.io",
            "HELM_CACHE_HOME": f"{_HOME}/helm",
            "HELM_CONFIG_HOME": f"{_HOME}/helm",
            "HELM_DATA_HOME": f"{_HOME}/helm",
        }

    def load(self, archive: Path, name: str) -> None:
        """Containerd.load()."""
        self.containerd.load(archive, name)

    def network(self, name: str, *plugins: dict[str, Any]) -> None:
        """Adds a network config to the node's folder, by a rename, so that no part of it is read."""
        text = json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins})
        part = self.machine.path(f"{NETCONF}/.{name}")
        part.write_text(text)
        part.rename(self.machine.path(f"{NETCONF}/{name}.conflist"))

    def plugin(self, name: str, script: str) -> None:
        """Adds an executable to the node's CNI folder."""
        path = self.machine.path(f"{PLUGINS}/{name}")
        path.write_text(script)
        path.chmod(0o755)

    def _program(self, name: str, *flags: str) -> Program:
        return Program(self.machine.popen, [name, *flags], self._folder / f"{name}.log", self._env)

    def _prepare(self) -> None:
        words = {"home": _HOME, "netconf": NETCONF, "plugins": PLUGINS, "cni": self.programs / "cni"}
        self.machine.run(["sh", "-euc", _PREPARE.format_map(words)])
        self.machine.make_cgroups()
        self.lab.switch.plug("cluster", self.lab.node, "eth0", 1500)
        self.lab.node.ip(
            f"address add {ADDRESS}/24 dev eth0",
            "route add default via 10.78.0.1",
            f"address add {_SERVICE}/32 dev lo",
            f"link add {_BRIDGE} up type bridge",  # else the plugin makes it and leaves it
        )
        self.lab.node.wait_until_up("eth0")
        self.network("10-pods", _PODS_NETWORK)
        tokens = []
        for number, (name, (user, group)) in enumerate(_USERS.items()):
            token = secrets.token_hex(16)
            tokens.append(f'{token},{user},{number},"{group}"\n')
            self._write(f"{name}.kubeconfig", json.dumps(_kubeconfig(token)))
        self._write("tokens.csv", "".join(tokens))
        self._write("kubelet.yaml", json.dumps(_kubelet(self.machine.cgroup)))

    def _start(self, stack: contextlib.ExitStack) -> None:
        """Starts the programs. containerd imports its image while the API server starts; its clients start after it."""
        etcd = self._program("etcd", f"--data-dir={_HOME}/etcd", "--unsafe-no-fsync", "--log-level=warn")
        server = self._program("kube-apiserver", *_server_flags())
        for program in (etcd, server):
            program.start()
        self.containerd = stack.enter_context(
            Containerd(
                self.machine,
                self._folder,
                netconf=NETCONF,
                plugins=PLUGINS,
                env=self._env,
                logs="/var/log/pods",
            )
        )
        self.cri = self.containerd.cri
        self._wait_server(server)
        self._program("kube-scheduler", *_client_flags("scheduler"), "--leader-elect=false").start()
        self._program("kube-controller-manager", *_controller_flags()).start()
        self.kubelet.start()
        self.wait_node()
        # The controllers make it, and without it the API server refuses every pod.
        self.kubectl("wait", "serviceaccount/default", "--for=create", f"--timeout={PATIENCE:g}s")

    def wait_node(self) -> None:
        """Waits until the API server reports the node as Ready."""
        try:
            self.kubectl("wait", f"node/{NODE}", "--for=create", f"--timeout={PATIENCE:g}s")
            self.wait(f"node/{NODE}", "condition=Ready", seconds=PATIENCE)
        except LabError as error:
            raise LabError(f"{error}\n{self.kubelet.tail()}\n{self.containerd.tail()}") from error

    def _wait_server(self, server: Program) -> None:
        """Waits until the API server is ready, for which it has no event."""

        def ready() -> bool:
            if not server.alive():
                raise LabError(f"the API server has ended; {server.tail()}")
            return (
                self._file("tls/apiserver.crt").exists()
                and self.kubectl("get", "--raw", "/readyz", check=False) == "ok"
            )

        wait_for(ready, lambda: f"the API server is not ready; {server.tail()}", pause=KUBECTL_PAUSE)

    def _file(self, name: str) -> Path:
        return self.machine.path(f"{_HOME}/{name}")

    def _write(self, name: str, text: str) -> None:
        self._file(name).write_text(text)

    def close(self) -> None:
        self._stack.close()


def _kubeconfig(token: str) -> dict[str, Any]:
    cluster = {"server": _SERVER, "certificate-authority": _CERTIFICATE}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": cluster}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user"}}],
        "current-context": "lab",
    }


def _kubelet(cgroup: str) -> dict[str, Any]:
    """The kubelet's configuration. Its port needs no authentication: only the node can reach it."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "nodeStatusUpdateFrequency": "1s",
        "syncFrequency": "2s",
        "maxPods": 250,
        # By default its control groups are outside of the machine's.
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "cgroupsPerQOS": True,
        "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        # The disk is the host's: how full it is must not end pods.
        "localStorageCapacityIsolation": False,
        "evictionHard": {"imagefs.available": "0%", "memory.available": "0%", "nodefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "registerNode": True,
        "serializeImagePulls": False,
    }


def _kubelet_flags() -> list[str]:
    return [
        f"--kubeconfig={_HOME}/kubelet.kubeconfig",
        f"--hostname-override={NODE}",
        f"--node-ip={ADDRESS}",
        "--v=2",
    ]


def _server_flags() -> list[str]:
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={ADDRESS}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--cert-dir={_HOME}/tls",  # it generates its certificate there
        "--secure-port=443",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={_HOME}/accounts.key",
        f"--service-account-signing-key-file={_HOME}/accounts.key",
        f"--token-auth-file={_HOME}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
    ]


def _controller_flags() -> list[str]:
    return [
        *_client_flags("controller-manager"),
        "--leader-elect=false",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={_HOME}/accounts.key",
        f"--root-ca-file={_CERTIFICATE}",
    ]


def _client_flags(user: str) -> list[str]:
    config = f"{_HOME}/{user}.kubeconfig"
    return [
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
    ]
