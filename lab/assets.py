"""What the lab gets from Debian and from Go: a guest's kernel and initramfs, cnitool and its plugins, the shape of
KubeVirt's objects; what the benchmark builds; and a Kubernetes. The emulated machine is lab/hardware.py's.

    python -m lab.assets                  says which of them are missing
    python -m lab.assets guest clients    makes those

All is in the cache folder and nothing is installed. Quiet: lab/setup shows the progress. Making needs root on
Debian (apt-get download).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

CHECKOUT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("VMTAP_CACHE") or CHECKOUT / ".cache")

CNITOOL = "github.com/containernetworking/cni/cnitool@v1.3.0"
PLUGINS = "github.com/containernetworking/plugins/plugins"
PLUGINS_VERSION = "v1.9.1"
PLUGIN_NAMES = ("ipam/host-local", "ipam/static", "meta/tuning", "meta/bandwidth")
BENCH_NAMES = ("main/macvlan", "main/tap")
"""Plugins that only the benchmark compares with."""
KUBEVIRT_API = "kubevirt.io/api"
KUBEVIRT_VERSIONS = ("v1.5.0", "v1.9.0")
"""The oldest that docs/kubevirt.md speaks of, and the newest when this was written."""
OLDEST_GO = (1, 24)

MANIFEST_TOOLS = ("helm.sh/helm/v3/cmd/helm@v3.19.0", "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1")
_HELM = "helm.sh/helm/v3/pkg/chartutil.k8sVersion"
_FOR_1_34 = f"-ldflags=-X={_HELM}Major=1 -X={_HELM}Minor=34"
"""What a release build of helm takes a cluster for that it cannot ask."""
_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.79.2"
_OPENSHIFT = "github.com/openshift/api@v0.0.0-20241216151652-de9de05a8e43"
_SCC = "0000_03_config-operator_01_securitycontextconstraints-Default.crd.yaml"
MANIFEST_SCHEMAS = (
    ("k8s.io/kubernetes@v1.34.4", "api/openapi-spec/swagger.json"),
    (_OPERATOR, "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"),
    (_OPERATOR, "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml"),
    (_OPENSHIFT, f"security/v1/zz_generated.crd-manifests/{_SCC}"),
)
"""Each a module, and a file in it."""

KUBERNETES = "v1.34.4"
CLUSTER = {
    f"k8s.io/kubernetes@{KUBERNETES}": (
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kubelet",
        "kubectl",
    ),
    "github.com/containerd/containerd/v2@v2.1.9": ("containerd", "containerd-shim-runc-v2", "ctr"),
    "go.etcd.io/etcd/server/v3@v3.6.8": (".",),
}
"""Module → its programs, each in its folder below cmd; "." is the module's own. runc is Debian's."""
CLUSTER_PLUGINS = ("main/loopback", "main/bridge", "ipam/host-local")
_STAMPS = {"k8s.io/kubernetes": f"-X=k8s.io/component-base/version.gitVersion={KUBERNETES}"}
"""By module, what else its linker is told. A cluster's version, which helm asks for, is written in by a release."""

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
MODULES = {
    "nic": (
        *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
        *("failover", "net_failover", "virtio_net", "virtio_console"),
    ),
    "seed": ("scsi_common", "scsi_mod", "virtio_scsi", "cdrom", "sr_mod", "isofs"),
}
"""What guest.init loads for what, in this order."""

_INIT = Path(__file__).with_name("guest.init")
_SHIM = CHECKOUT / "cni/shim/vmtap.c"
_BENCH_SOURCES = (Path(__file__).parent / "bench/spawn.c", Path(__file__).parent / "bench/moment.c")
_PACKAGE_BUILD = CHECKOUT / "hatch_build.py"
_GO_ENV = {
    **os.environ,
    "CGO_ENABLED": "0",
    "GOPATH": str(CACHE / "go"),
    "GOCACHE": str(CACHE / "go-build"),
    "GOFLAGS": "-trimpath -modcacherw",
    "GOTOOLCHAIN": "local",
    "GOWORK": "off",
}
_LATE = re.compile(
    r"time(d )?out|deadline exceeded|connection re(set|fused)|EOF|\b(429|50[0234])\b|temporary failure", re.I
)
"""What Go says of a proxy that may answer the next time."""
_PAUSES = (2.0, 10.0, 30.0)


class AssetError(RuntimeError):
    """An asset cannot be made or is not there; the text says what to do."""


@dataclass(frozen=True)
class Guest:
    """What QEMU boots."""

    kernel: Path
    initramfs: Path


def guest() -> Guest:
    """The guest's files; AssetError if they were not made yet."""
    return Guest(made(_kernel_folder() / "vmlinuz"), made(_initramfs_path()))


def clients() -> Path:
    """The folder with cnitool and the reference plugins; AssetError if it was not made yet."""
    return made(_clients_folder())


def bench() -> Path:
    """The folder with the benchmark's programs: shim, macvlan, tap, spawn, moment; AssetError if it was not made."""
    return made(_bench_folder(), "bench")


def kubevirt() -> list[Path]:
    """A folder for each of KUBEVIRT_VERSIONS: of each kind an object, in JSON, in which every field is set.

    AssetError if they were not made yet.
    """
    return [made(_kubevirt_folder(version), "test") for version in KUBEVIRT_VERSIONS]


def manifests() -> Path:
    """The folder with helm, kustomize and the files of MANIFEST_SCHEMAS; AssetError if it was not made."""
    return made(_manifests_folder(), "cluster")


def cluster() -> Path:
    """The folder with the programs of CLUSTER, and `cni`, the reference plugins; AssetError if it was not made."""
    return made(_cluster_folder(), "cluster")


def make_guest() -> None:
    """The kernel's files and the initramfs, each if it is not there."""
    if platform.machine() != "x86_64":
        raise AssetError(f"the lab's guests are for x86_64, this machine is {platform.machine()}")
    folder = _kernel_folder()
    if not folder.exists():
        with building(folder) as parts:
            _unpack_kernel(parts)
    image = _initramfs_path()
    if not image.exists():
        with building(image) as part:
            part.write_bytes(gzip.compress(_initramfs(folder), compresslevel=6, mtime=0))


def make_clients() -> None:
    """cnitool and the reference plugins, with the machine's Go or the one in the virtual environment."""
    with building(_clients_folder()) as parts:
        _go_install([CNITOOL], parts)
        _go_install([f"{PLUGINS}/{name}@{PLUGINS_VERSION}" for name in PLUGIN_NAMES], parts)


def make_bench() -> None:
    """The peers with Go; our shim and the programs that measure with musl's C library, static and small."""
    with building(_bench_folder()) as parts:
        _go_install([f"{PLUGINS}/{name}@{PLUGINS_VERSION}" for name in BENCH_NAMES], parts)
        from hatch_build import FLAGS  # noqa: PLC0415 - it wants hatchling; nothing else here does

        for source in (_SHIM, *_BENCH_SOURCES):
            run(["musl-gcc", *FLAGS, "-o", parts / source.stem, source])


def make_kubevirt() -> None:
    """What the module of KubeVirt's types is tested with; nothing is built."""
    for version in KUBEVIRT_VERSIONS:
        folder = _kubevirt_folder(version)
        if not folder.exists():
            with building(folder) as part:
                said = _ask_go("mod", "download", "-json", f"{KUBEVIRT_API}@{version}")
                module = Path(json.loads(said)["Dir"])
                shutil.copytree(module / "apitesting/testdata/HEAD", part)


def make_manifests() -> None:
    """Tools and schemas; of the latter's modules, only the files are wanted."""
    with building(_manifests_folder()) as parts:
        for package in MANIFEST_TOOLS:
            _go_install([_FOR_1_34, package], parts)
        for module, path in MANIFEST_SCHEMAS:
            said = _ask_go("mod", "download", "-json", module, cwd=CACHE)
            shutil.copy(Path(json.loads(said)["Dir"], path), parts)


def make_cluster() -> None:
    """A Kubernetes and its container runtime, from their modules: ten minutes on two cores, 6 GB of cache.

    A line on stderr says what is being built: with lab/setup it is in the log.
    """
    with building(_cluster_folder()) as parts:
        _go_install([f"{PLUGINS}/{name}@{PLUGINS_VERSION}" for name in CLUSTER_PLUGINS], parts / "cni")
        for number, (module, programs) in enumerate(CLUSTER.items(), start=1):
            print(f"lab.assets: {number} of {len(CLUSTER)}, {module}: {' '.join(programs)}", file=sys.stderr)
            _go_build(module, programs, parts)
        (parts / "server").rename(parts / "etcd")


def _go_install(packages: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _ask_go("install", *packages, env={**_GO_ENV, "GOBIN": str(folder)})


def _go_build(module: str, programs: Sequence[str], folder: Path) -> None:
    """Builds programs of a module that `go install` refuses, because its go.mod replaces other modules.

    What it replaces by folders of its own repository is published as modules, too: v1.34.4 of Kubernetes goes with
    v0.34.4 of each. So a module of ours requires the one and replaces the others.
    """
    path, version = module.split("@")
    with tempfile.TemporaryDirectory(prefix="gobuild.", dir=CACHE) as here:

        def go(*words: str) -> str:
            return _ask_go(*words, cwd=Path(here))

        go("mod", "init", "lab")
        its_file = json.loads(go("mod", "download", "-json", module))["GoMod"]
        replaced = json.loads(go("mod", "edit", "-json", its_file))["Replace"] or ()
        staged = [each["Old"]["Path"] for each in replaced if each["New"]["Path"].startswith("./staging/")]
        same = version.replace("v1.", "v0.", 1)
        go("mod", "edit", f"-require={module}", *(f"-replace={name}={name}@{same}" for name in staged))
        packages = [path if name == "." else f"{path}/cmd/{name}" for name in programs]
        flags = f"-ldflags=-s -w {_STAMPS.get(path, '')}"
        go("build", "-mod=mod", flags, "-o", f"{folder}/", *packages)


def _kernel_folder() -> Path:
    return CACHE / "guest-kernel"


def _initramfs_path() -> Path:
    stamp = hashlib.sha256(_INIT.read_bytes() + repr(MODULES).encode()).hexdigest()[:12]
    return CACHE / f"guest-{stamp}.cpio.gz"


def _clients_folder() -> Path:
    stamp = hashlib.sha256(" ".join((CNITOOL, PLUGINS_VERSION, *PLUGIN_NAMES)).encode()).hexdigest()[:12]
    return CACHE / f"clients-{stamp}"


def _kubevirt_folder(version: str) -> Path:
    return CACHE / f"kubevirt-{version}"


def _bench_folder() -> Path:
    sources = b"".join(source.read_bytes() for source in (_SHIM, *_BENCH_SOURCES, _PACKAGE_BUILD))
    versions = " ".join((PLUGINS_VERSION, *BENCH_NAMES)).encode()
    return CACHE / f"bench-{hashlib.sha256(sources + versions).hexdigest()[:12]}"


def _manifests_folder() -> Path:
    versions = repr((MANIFEST_TOOLS, _FOR_1_34, MANIFEST_SCHEMAS))
    return CACHE / f"manifests-{hashlib.sha256(versions.encode()).hexdigest()[:12]}"


def _cluster_folder() -> Path:
    versions = repr((CLUSTER, CLUSTER_PLUGINS, PLUGINS_VERSION))
    return CACHE / f"cluster-{hashlib.sha256(versions.encode()).hexdigest()[:12]}"


def made(path: Path, what: str = "demo") -> Path:
    if not path.exists():
        raise AssetError(f"{path} is not there: run lab/setup {what}")
    return path


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A path to make the target at; it gets the target's name when all went well, and is removed if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
        part = Path(scratch) / "part"
        yield part
        part.rename(target)


def _unpack_kernel(parts: Path) -> None:
    """vmlinuz, busybox and the modules, all of them: which are loaded is the initramfs's matter."""
    with tempfile.TemporaryDirectory(prefix="unpack.", dir=CACHE) as scratch:
        root = Path(scratch)
        unpack(real_package(KERNEL_PACKAGE), root)
        unpack(BUSYBOX_PACKAGE, root)
        parts.mkdir()
        (root / "bin/busybox").rename(parts / "busybox")
        for kernel in (root / "boot").glob("vmlinuz-*"):
            kernel.rename(parts / "vmlinuz")
        for modules in (root / "lib/modules").iterdir():
            modules.rename(parts / "modules")


def real_package(package: str, options: Sequence[str] = ()) -> str:
    """The package that a meta-package such as linux-image-cloud-amd64 stands for today."""
    said = with_lists(["apt-cache", *options, "depends", package])
    found = re.search(r"Depends: (linux-image-\S+)", said)
    if not found:
        raise AssetError(f"apt-cache knows no kernel for {package}: is this Debian?")
    return found[1]


def unpack(package: str, root: Path, options: Sequence[str] = ()) -> None:
    with tempfile.TemporaryDirectory(prefix="deb.", dir=CACHE) as scratch:
        with_lists(
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *options, "download", package],
            cwd=Path(scratch),
        )
        for archive in Path(scratch).glob("*.deb"):
            run(["dpkg-deb", "-x", archive, root])


def with_lists(argv: Sequence[str], cwd: Path | None = None) -> str:
    """Runs an apt command, and again with fresh package lists if it fails: there may be old ones or none."""
    with contextlib.suppress(AssetError):
        return run(argv, cwd=cwd)
    run(["apt-get", "-q", "update"])
    return run(argv, cwd=cwd)


def _initramfs(kernel: Path) -> bytes:
    """The guest's root file system as a cpio archive."""
    found = {path.stem: path for path in (kernel / "modules").rglob("*.ko")}
    needed = [name for names in MODULES.values() for name in names]
    missing = [name for name in needed if name not in found]
    if missing:
        raise AssetError(f"{kernel}/modules has no {', '.join(missing)}: remove {kernel} to unpack it again")
    files: dict[str, tuple[int, bytes]] = {
        **dict.fromkeys(("bin", "dev", "modules", "proc", "seed", "sys", "tmp"), (0o040755, b"")),
        "bin/busybox": (0o100755, (kernel / "busybox").read_bytes()),
        "init": (0o100755, _INIT.read_bytes()),
        **{f"modules/{use}.order": (0o100644, lines(names)) for use, names in MODULES.items()},
        **{f"modules/{name}.ko": (0o100644, found[name].read_bytes()) for name in needed},
    }
    return cpio(files)


def lines(names: Sequence[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def cpio(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A newc archive of name → (mode, data); the kernel's driver-api/early-userspace/buffer-format.rst."""
    archive = bytearray()
    for number, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], start=1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _go() -> str:
    """The machine's Go, else the one that lab/setup puts into the virtual environment."""
    for candidate in (shutil.which("go"), CACHE / "venv/bin/go"):
        if candidate and Path(candidate).exists():
            version = re.search(r"go(\d+)\.(\d+)", run([candidate, "version"]))
            if version and (int(version[1]), int(version[2])) >= OLDEST_GO:
                return str(candidate)
    raise AssetError(f"no Go ≥ {'.'.join(map(str, OLDEST_GO))}: lab/setup gets one, run that")


def _ask_go(*words: str, env: Mapping[str, str] = _GO_ENV, cwd: Path | None = None) -> str:
    """What Go says; asked again if the proxy of its modules is late: what Go has got by then, it keeps."""
    argv = [_go(), *words]
    for pause in _PAUSES:
        try:
            return run(argv, env=env, cwd=cwd)
        except AssetError as error:
            if not _LATE.search(str(error)):
                raise
        time.sleep(pause)
    return run(argv, env=env, cwd=cwd)


def run(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise AssetError(
            f"{argv[0]} is not installed: the lab needs Debian and what lab/setup installs"
        ) from error
    if done.returncode != 0:
        raise AssetError(
            f"{' '.join(map(str, argv))}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def main(names: Sequence[str]) -> int:
    from lab import hardware  # noqa: PLC0415 - it builds on this file

    makers: dict[str, tuple[Callable[[], object], Callable[[], None]]] = {
        "guest": (guest, make_guest),
        "clients": (clients, make_clients),
        "kubevirt": (kubevirt, make_kubevirt),
        "bench": (bench, make_bench),
        "hardware": (hardware.files, hardware.make),
        "manifests": (manifests, make_manifests),
        "cluster": (cluster, make_cluster),
    }
    unknown = [name for name in names if name not in makers]
    if unknown:
        print(f"lab.assets: no asset {', '.join(unknown)}; there is {', '.join(makers)}", file=sys.stderr)
        return 2
    missing = []
    for name, (find, _) in makers.items():
        try:
            find()
        except AssetError:
            missing.append(name)
    if not names:
        print(*missing)
    try:
        for name in names:
            if name in missing:
                makers[name][1]()
    except AssetError as error:
        print(f"lab.assets: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from lab import assets  # noqa: PLW0406 - what this file's other self raises is another class of error

    sys.exit(assets.main(sys.argv[1:]))
