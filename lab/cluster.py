"""A Kubernetes of one node: the real API server, controllers, scheduler, etcd, kubelet, containerd and runc, by hand.

On a lab's machine (lab/machine.py), so that nothing can outlive it, and nothing of the host's is touched. No registry:
images are imported. No proxy and no DNS: a pod is reached by its address. Must not know what runs in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lab import assets, image
from lab.cri import Cri, CriError
from lab.machine import Machine
from lab.wire import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.wire import Lab

NODE = "node"
"""Its name; also the machine's in the lab."""
ADDRESS = "10.78.0.2"
BUSYBOX = "lab.invalid/busybox:1"
"""The image of every sandbox; pods may have it, too."""
NETCONF = "/etc/cni/net.d"
PLUGINS = "/opt/cni/bin"
"""On the node; the reference plugins loopback, bridge and host-local are in it."""
PATIENCE = 180.0
"""Seconds for what usually takes one."""
_BRIDGE = "cni0"
_HOME = "/run/lab/cluster"
"""On the node: what the programs keep and write."""
_SOCKET = "/run/containerd/containerd.sock"
_LOG_TAIL = 3000
_LOOK_SECONDS = 0.02
_SERVER = f"https://{ADDRESS}"
_SERVICE = "10.96.0.1"
"""Where pods find the API server: an address of the node, in place of a proxy."""
_CERTIFICATE = f"{_HOME}/tls/apiserver.crt"

# Folders that the programs write to are the machine's, with what is written kept apart; mounts spread, as on a host
# with systemd. What a kubelet would tune is shown to it as tuned: the kernel is not the lab's.
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

_CONTAINERD = """
version = 3
root = "/run/lab/containerd"
state = "/run/containerd"

[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{sandbox}"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{plugins}"]
conf_dir = "{netconf}"
max_conf_num = 0

[plugins."io.containerd.internal.v1.opt"]
path = "/run/lab/opt"
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


class Program:
    """One of the node's, that may be ended and started again. log: on the host."""

    def __init__(self, machine: Machine, argv: Sequence[str], log: Path, path: str) -> None:
        self.name = Path(argv[0]).name
        self.log = log
        self._machine = machine
        self._argv = argv
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = self._machine.popen(
                self._argv, stdout=log, stderr=log, env={"PATH": self._path, "HOME": "/root"}
            )

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Returns when it has ended."""
        assert self._process
        self._process.send_signal(number)
        self._process.wait(PATIENCE)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """The end of its log, for an error."""
        return f"{self.name} said: {self.log.read_text(errors='replace')[-_LOG_TAIL:]}"


class Cluster:
    """Started, with its node Ready; a context manager, to be closed before its lab.

    folder: for logs, on the host. The node has eth0 for the cluster beside the lab's NICs. Pods have a bridge as their
    first network; each further config in NETCONF is attached, too, by name.
    """

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.programs = assets.cluster()
        self._folder = folder
        with contextlib.ExitStack() as stack:
            self.machine = stack.enter_context(Machine(lab.node))
            self._path = f"{self.programs}:{assets.manifests()}:{os.environ['PATH']}"
            self._prepare()
            self.cri = Cri(self.machine.path(_SOCKET), self.machine.cgroup, "/var/log/pods")
            stack.callback(self.cri.close)
            self.containerd = self._program("containerd", f"--config={_HOME}/containerd.toml")
            self.kubelet = self._program("kubelet", f"--config={_HOME}/kubelet.yaml", *self._kubelet_flags())
            self._start()
            self._stack = stack.pop_all()

    def kubectl(self, *words: str, stdin: str = "", check: bool = True, timeout: float = 2 * PATIENCE) -> str:
        """What it printed; LabError with what it said if check and it failed."""
        return self.run(["kubectl", *words], stdin=stdin, check=check, timeout=timeout)

    def get(self, *words: str) -> Any:
        """The JSON of `kubectl get`."""
        return json.loads(self.kubectl("get", "-o", "json", *words))

    def apply(self, *objects: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(listed))

    def wait(self, what: str, condition: str, *words: str, seconds: float = 2 * PATIENCE) -> None:
        """kubectl wait; condition: its --for, condition=Ready or jsonpath=…. LabError with what there is instead."""
        try:
            self.kubectl(
                "wait", what, f"--for={condition}", f"--timeout={seconds:g}s", *words, timeout=seconds + 10
            )
        except LabError as error:
            raise LabError(f"{error}\n{self.story()}") from error

    def story(self) -> str:
        """The pods and the last events, for an error."""
        pods = self.kubectl("get", "pods", "-A", "-o", "wide", check=False)
        events = self.kubectl("get", "events", "-A", "--sort-by=.lastTimestamp", check=False)
        ended = [each.said() for each in (self.kubelet, self.containerd) if not each.alive()]
        return "\n".join([pods, events[-_LOG_TAIL:], *ended])

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: str = "",
        check: bool = True,
        timeout: float = 2 * PATIENCE,
    ) -> str:
        """What a command printed that runs on the node, as the cluster's administrator."""
        return self.machine.run(
            argv, stdin=stdin, check=check, env=self.environment(), timeout=timeout
        ).stdout

    def environment(self) -> dict[str, str]:
        """For commands on the node."""
        return {
            **os.environ,
            "PATH": self._path,
            "KUBECONFIG": f"{_HOME}/admin.kubeconfig",
            "KUBECACHEDIR": f"{_HOME}/kubectl",  # else the host's, where another cluster of this address may be known
            "CONTAINERD_ADDRESS": _SOCKET,
            "CONTAINERD_NAMESPACE": "k8s.io",
            "HELM_CACHE_HOME": f"{_HOME}/helm",
            "HELM_CONFIG_HOME": f"{_HOME}/helm",
            "HELM_DATA_HOME": f"{_HOME}/helm",
        }

    def load(self, archive: Path, name: str) -> None:
        """An image from an OCI tar file on the host; name: with registry and tag, as pods ask for it."""
        self.run(["ctr", "images", "import", archive])
        self.cri.wait_image(name)

    def network(self, name: str, *plugins: dict[str, Any]) -> None:
        """A network config in the node's folder, complete from the first moment on."""
        text = json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins})
        part = self.machine.path(f"{NETCONF}/.{name}")
        part.write_text(text)
        part.rename(self.machine.path(f"{NETCONF}/{name}.conflist"))

    def plugin(self, name: str, script: str) -> None:
        """An executable in the node's CNI folder."""
        path = self.machine.path(f"{PLUGINS}/{name}")
        path.write_text(script)
        path.chmod(0o755)

    def wait_kind(self, kind: str) -> None:
        """Until kubectl finds objects of a kind, which the API server lists a moment after it is Established."""
        until = time.monotonic() + PATIENCE
        while not self.kubectl("get", kind, "-o", "json", check=False):
            if time.monotonic() > until:
                raise LabError(f"the API server does not come to know of {kind}")
            time.sleep(10 * _LOOK_SECONDS)

    def wait_containerd(self) -> None:
        """Until it takes requests, after a start."""
        try:
            self.cri.wait_ready(alive=self.containerd.alive)
        except CriError as error:
            raise LabError(f"containerd does not answer ({error}); {self.containerd.said()}") from error

    def _program(self, name: str, *flags: str) -> Program:
        return Program(
            self.machine, [str(self.programs / name), *flags], self._folder / f"{name}.log", self._path
        )

    def _prepare(self) -> None:
        words = {"home": _HOME, "netconf": NETCONF, "plugins": PLUGINS, "cni": self.programs / "cni"}
        self.machine.run(["sh", "-euc", _PREPARE.format_map(words)])
        self.lab.switch.plug("cluster", self.lab.node, "eth0", 1500)
        self.lab.node.ip(
            f"address add {ADDRESS}/24 dev eth0",
            "route add default via 10.78.0.1",
            f"address add {_SERVICE}/32 dev lo",
            f"link add {_BRIDGE} up type bridge",  # the plugin would make it, and leave it
        )
        self.lab.node.wait_until_up("eth0")
        self.network("10-pods", _PODS_NETWORK)
        text = _CONTAINERD.format(sandbox=BUSYBOX, plugins=PLUGINS, netconf=NETCONF)
        self._write("containerd.toml", text)
        tokens = []
        for number, (name, (user, group)) in enumerate(_USERS.items()):
            token = secrets.token_hex(16)
            tokens.append(f'{token},{user},{number},"{group}"\n')
            self._write(f"{name}.kubeconfig", json.dumps(_kubeconfig(token)))
        self._write("tokens.csv", "".join(tokens))
        self._write("kubelet.yaml", json.dumps(_kubelet(self.machine.cgroup)))

    def _start(self) -> None:
        """containerd takes its images while the API server starts; what needs that one is started after it."""
        etcd = self._program("etcd", f"--data-dir={_HOME}/etcd", "--unsafe-no-fsync", "--log-level=warn")
        server = self._program("kube-apiserver", *_server_flags())
        for program in (etcd, server, self.containerd):
            program.start()
        self.wait_containerd()
        archive = self._folder / "busybox.tar"
        image.busybox(archive, BUSYBOX)
        self.load(archive, BUSYBOX)
        self._wait_server(server)
        self._program("kube-scheduler", *_client_flags("scheduler"), "--leader-elect=false").start()
        self._program("kube-controller-manager", *_controller_flags()).start()
        self.kubelet.start()
        self.wait_node()
        # The controllers make it, and without it the API server takes no pod.
        self.kubectl("wait", "serviceaccount/default", "--for=create", f"--timeout={PATIENCE:g}s")

    def wait_node(self) -> None:
        """Until the node is Ready, as far as the API server has been told."""
        try:
            self.kubectl("wait", f"node/{NODE}", "--for=create", f"--timeout={PATIENCE:g}s")
            self.wait(f"node/{NODE}", "condition=Ready", seconds=PATIENCE)
        except LabError as error:
            raise LabError(f"{error}\n{self.kubelet.said()}\n{self.containerd.said()}") from error

    def _wait_server(self, server: Program) -> None:
        until = time.monotonic() + PATIENCE
        while self._file("tls/apiserver.crt").exists() is False or not self._server_ready():
            # It tells nobody when it is.
            if time.monotonic() > until or not server.alive():
                raise LabError(f"the API server does not become ready; {server.said()}")
            time.sleep(10 * _LOOK_SECONDS)

    def _server_ready(self) -> bool:
        return self.kubectl("get", "--raw", "/readyz", check=False) == "ok"

    def _kubelet_flags(self) -> list[str]:
        return [
            f"--kubeconfig={_HOME}/kubelet.kubeconfig",
            f"--hostname-override={NODE}",
            f"--node-ip={ADDRESS}",
            "--v=2",
        ]

    def _file(self, name: str) -> Path:
        return self.machine.path(f"{_HOME}/{name}")

    def _write(self, name: str, text: str) -> None:
        self._file(name).write_text(text)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    """Its configuration. Whoever reaches its port may use it: only the node can."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{_SOCKET}",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "nodeStatusUpdateFrequency": "1s",
        "syncFrequency": "2s",
        "maxPods": 250,
        # Its own control groups would be outside of the machine's.
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        # The disk is the host's, and how full it is not the lab's matter.
        "localStorageCapacityIsolation": False,
        "evictionHard": {"imagefs.available": "0%", "memory.available": "0%", "nodefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "registerNode": True,
        "serializeImagePulls": False,
    }


def _server_flags() -> list[str]:
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={ADDRESS}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--cert-dir={_HOME}/tls",  # it makes its certificate by itself
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
