"""Makes NODE of lab/assets/kind.py: python -m lab.kind.node FOLDER.

The image of kind's nodes is made as kind v0.30.0 makes it (images/base/Dockerfile and pkg/build/nodeimage of its
module), with files of that module and with what Debian and the Go modules have:

- debootstrap makes what that Dockerfile starts from, and runc is Debian's.
- Kubernetes, etcd, coredns and containerd are the programs of the assets; an image is one layer with the program and,
  for kube-proxy, iptables. containerd has imported them, as in a real node image.
- /kind/manifests/default-cni.yaml lets nodes read each other, and network.sh on each node does what kindnetd does.
- cover.sh keeps the kubelet from changing the host's kernel.
- containerd attaches every network config of its folder, not only the first: the stand-in for Multus is the second.
- There is no fuse-overlayfs and no provisioner of storage.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from lab.assets import golang
from lab.assets.cache import CACHE, build
from lab.assets.images import BASE
from lab.assets.kind import COREDNS_VERSION, ETCD_TAG, KIND_MODULE, PROGRAMS
from lab.assets.programs import CLUSTER, KUBERNETES
from lab.kind.docker import BASE_IMAGE, NODE_IMAGE, Docker
from lab.runtimes import image
from lab.runtimes.containerd import SANDBOX

_SUITE = "bookworm"
_PACKAGES = (
    "bash,ca-certificates,conntrack,ethtool,iproute2,iptables,jq,kmod,libseccomp2,mount,nftables,procps,python3,runc,"
    "systemd,util-linux"
)
_HERE = Path(__file__).parent
_XTABLES = Path("/usr/lib/x86_64-linux-gnu/xtables")
_NFT = Path("/usr/sbin/xtables-nft-multi")
_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
_REGISTRY = "registry.k8s.io"
_CONTAINER = """FROM imported
ENV container=docker
STOPSIGNAL SIGRTMIN+3
ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]
"""

_BASE = """FROM imported
COPY ca-certificates.crt /etc/ssl/certs/
"""
"""With the machine's certificates, where it has some of its own."""

# After images/base/Dockerfile.
_SETUP = r"""
systemd=/lib/systemd/system
rm -f $systemd/sysinit.target.wants/systemd-tmpfiles-setup.service $systemd/multi-user.target.wants/* \
    /etc/systemd/system/*.wants/* $systemd/local-fs.target.wants/* $systemd/sockets.target.wants/*udev* \
    $systemd/sockets.target.wants/*initctl* $systemd/basic.target.wants/*
rm -f /usr/lib/sysctl.d/* # of the kernel, not of the node's namespaces
echo ReadKMsg=no >>/etc/systemd/journald.conf
ln -sf /lib/systemd/systemd /sbin/init
systemctl enable kubelet.service containerd.service undo-mount-hacks.service pod-network.service
systemctl mask systemd-binfmt.service
mkdir -p /etc/kubernetes/manifests /etc/cni/net.d
ctr oci spec \
    | jq '.hooks.createContainer += [{"path": "/kind/bin/mount-product-files.sh"}] | del(.process.rlimits)' \
    >/etc/containerd/cri-base.json
sed -i 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' /etc/containerd/config.toml
cat >>/etc/containerd/config.toml <<EOF
[plugins."io.containerd.grpc.v1.cri".cni]
  max_conf_num = 0
EOF
"""
_FILES = {
    "/etc/systemd/system/kubelet.service.d/20-cover.conf": "[Service]\nExecStartPre=/kind/bin/cover.sh\n",
    "/etc/systemd/system/pod-network.service": "[Unit]\nStartLimitIntervalSec=0\n"
    "[Service]\nExecStart=/kind/bin/network.sh\nRestart=always\nRestartSec=1s\n[Install]\nWantedBy=multi-user.target\n",
    "/kind/version": KUBERNETES,
    "/kind/manifests/default-storage.yaml": """apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: standard
  annotations: {storageclass.kubernetes.io/is-default-class: "true"}
provisioner: kubernetes.io/no-provisioner
""",
    "/kind/manifests/default-cni.yaml": """apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: pod-network}
rules:
  - {apiGroups: [""], resources: [nodes], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: pod-network}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: pod-network}
subjects:
  - {apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:nodes"}
""",
}

# containerd of the node image imports archives, in a mount and pid namespace that ends with it.
_IMPORT = """
root=$1 archives=$2
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mknod -m 666 "$root/tmp/null" c 1 3
mkdir "$root/run/archives"
mount --bind "$archives" "$root/run/archives"
chroot "$root" containerd --log-level warn &
until chroot "$root" ctr version >/dev/null 2>&1; do
    sleep 0.1
    kill -0 $!
done
for archive in "$root"/run/archives/*.tar; do
    chroot "$root" ctr -n k8s.io images import --all-platforms --digests "/run/archives/${archive##*/}"
done
chroot "$root" ctr -n k8s.io images list -q
kill $!
wait $! || true
"""


def make(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kind-node.", dir=CACHE) as scratch:
        root, archives, logs = (Path(scratch, name) for name in ("root", "archives", "logs"))
        for each in (root, archives, logs):
            each.mkdir(mode=0o755)
        _progress("debootstrap")
        build(["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, root])
        _progress("the node's files")
        _fill(root)
        _progress("images of the control plane")
        _archives(archives)
        build([*_NAMESPACES, "sh", "-euc", _IMPORT, "sh", root, archives])
        with Docker(logs) as docker:
            _progress("docker import")
            files = f"tar --numeric-owner --exclude='./dev/*' -C {root} -cf - ."
            docker.run(["sh", "-euc", f"{files} | docker import - imported"], timeout=None)
            classic = {**docker.environment(), "DOCKER_BUILDKIT": "0"}
            docker.run(["docker", "build", "-t", NODE_IMAGE, "-"], stdin=_CONTAINER, env=classic)
            docker.run(["docker", "import", BASE.ensure(), "imported"], timeout=None)
            shutil.copy("/etc/ssl/certs/ca-certificates.crt", logs)
            (logs / "Dockerfile").write_text(_BASE)
            docker.run(["docker", "build", "-t", BASE_IMAGE, logs], env=classic)
            _progress("docker's data")
            docker.save(target)


def _fill(root: Path) -> None:
    for needless in ("var/cache/apt/archives", "var/lib/apt/lists"):
        for file in Path(root, needless).glob("*.*"):
            file.unlink()
    files = golang.files(KIND_MODULE) / "images/base/files"
    for name in ("etc", "kind", "usr"):
        for source in (files / name).rglob("*"):
            if source.is_file():
                executable = "/bin/" in str(source.relative_to(files))
                _install(source, root / source.relative_to(files), 0o755 if executable else 0o644)
    for name in ("cover.sh", "network.sh"):
        _install(_HERE / name, root / "kind/bin" / name)
    cluster, own = CLUSTER.get(), PROGRAMS.get()
    for name in ("containerd", "containerd-shim-runc-v2", "ctr"):
        _install(cluster / name, root / "usr/local/bin" / name)
    _install(own / "crictl", root / "usr/local/bin/crictl")
    for source in (cluster / "kubelet", cluster / "kubectl", own / "kubeadm"):
        _install(source, root / "usr/bin" / source.name)
    for folder, names in ((cluster, ("loopback", "host-local")), (own, ("ptp", "portmap"))):
        for name in names:
            _install(folder / "cni" / name, root / "opt/cni/bin" / name)
    for path, text in _FILES.items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    build(["chroot", root, "sh", "-euc", _SETUP])


def _install(source: Path, target: Path, mode: int = 0o755) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _archives(folder: Path) -> None:
    """The images that kubeadm and containerd want, by their names."""
    cluster, own = CLUSTER.get(), PROGRAMS.get()
    image.busybox(folder / "busybox.tar", SANDBOX)
    image.busybox(folder / "pause.tar", f"{_REGISTRY}/pause:3.10")
    for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler"):
        tree: dict[str, Path | bytes | str] = {f"usr/bin/{name}": cluster / name}
        image.write(folder / f"{name}.tar", f"{_REGISTRY}/{name}:{KUBERNETES}", tree, [name])
    image.write(
        folder / "etcd.tar", f"{_REGISTRY}/etcd:{ETCD_TAG}", {"usr/bin/etcd": cluster / "etcd"}, ["etcd"]
    )
    image.write(
        folder / "coredns.tar",
        f"{_REGISTRY}/coredns/coredns:{COREDNS_VERSION}",
        {"coredns": own / "coredns"},
        ["/coredns"],
    )
    image.write(
        folder / "kube-proxy.tar",
        f"{_REGISTRY}/kube-proxy:{KUBERNETES}",
        {"usr/local/bin/kube-proxy": own / "kube-proxy", **_iptables()},
        ["/usr/local/bin/kube-proxy"],
    )


def _iptables() -> dict[str, Path | bytes | str]:
    """iptables by nf_tables, with its extensions and the libraries of both."""
    extensions = [*_XTABLES.glob("*.so")]
    libraries = {path for program in (_NFT, *extensions) for path in image.libraries(program)}
    tree: dict[str, Path | bytes | str] = {
        str(path).lstrip("/"): path for path in {*extensions, *libraries, _NFT}
    }
    for family in ("iptables", "ip6tables"):
        for verb in ("", "-save", "-restore"):
            tree[f"usr/bin/{family}{verb}"] = str(_NFT)
    return tree


def _progress(text: str) -> None:
    print(f"lab.kind.node: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
