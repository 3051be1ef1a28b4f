"""libvirt in a pod, as KubeVirt's virt-launcher runs it: an unprivileged session daemon, a private /dev, a domain.

KubeVirt itself does not run here; this follows its sources (1.5: pkg/network/namescheme and domainspec,
pkg/virt-launcher/virtwrap/converter/network and util). The daemon is Debian's monolithic libvirtd instead of
virtqemud: the QEMU driver is the same. There is no device cgroup. Must not make attachments.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.guest import Conversation
from lab.process import PATIENCE, Closing, LabError, run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lab.guest import Image
    from lab.wire import Netns

QEMU_USER = 107
"""uid and gid of KubeVirt's qemu user."""
_INSIDE = Path("/mnt")
"""The path of a daemon's folder inside its pod; equal in all pods, so that a migrated domain finds its files."""
_TAIL = 2000

_POD = """
set -eu
exec 3<&0 </dev/null
user=$1 folder=$2 count=$3
shift 3
# The container's /dev as runc makes it: the node of a DeviceSpec gets the owner and mode of the host's node.
mount -t tmpfs -o nosuid,noexec,mode=755 tmpfs /dev
mkdir /dev/pts /dev/shm /dev/net
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /dev/shm
ln -s pts/ptmx /dev/ptmx
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/zero c 1 5
mknod -m 666 /dev/full c 1 7
mknod -m 666 /dev/random c 1 8
mknod -m 666 /dev/urandom c 1 9
mknod -m 666 /dev/tty c 5 0
mknod -m 666 /dev/net/tun c 10 200 # KubeVirt's own device plugin gives it to every launcher
while [ "$count" -gt 0 ]; do
    numbers=$(stat -c '0x%t 0x%T' "$1")
    mknod "/dev/${1##*/}" c ${numbers}
    chown "$(stat -c %u:%g "$1")" "/dev/${1##*/}"
    chmod "$(stat -c %a "$1")" "/dev/${1##*/}"
    shift
    count=$((count - 1))
done
mount -t sysfs -o ro sysfs /sys
mount --bind "$folder/passwd" /etc/passwd
mount --bind "$folder/group" /etc/group
mount --bind "$folder" /mnt
echo "${folder##*/}" >/proc/sys/kernel/hostname # libvirt migrates no domain to a host of the same name
umask 022
# Not exec: the first process of a pod becomes the parent of orphaned daemons, and reaps them.
sh -euc 'export LISTEN_PID=$$; exec "$@"' sh \
    setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs \
    --bounding-set=-all,+net_bind_service --inh-caps=-all,+net_bind_service --ambient-caps=-all,+net_bind_service \
    "$@" &
wait $!
"""
"""A script for the pod's namespaces; its stdin is the socket that the daemon will listen on.

Arguments: the user, the folder, the number of device nodes, the device nodes, the daemon's command line.
"""


def ifname(network: str) -> str:
    """The ifname in the pod for a network of the VM's spec (namescheme: 14 characters)."""
    return f"pod{hashlib.sha256(network.encode()).hexdigest()[:11]}"


@dataclass(frozen=True)
class Nic:
    """An interface and a network of a VM's spec. address: one that the guest sets itself."""

    network: str
    address: str | None = None
    mac: str | None = None


def interface(link: Mapping[str, Any], nic: Nic, queues: int = 1) -> str:
    """The element <interface> that virt-launcher writes for a binding with domainAttachmentType tap.

    link: the pod's link, from `ip -d -j link`. It gives the MTU, and the MAC if the VM's spec has none.
    queues: the VM's number of processors if its spec has networkInterfaceMultiqueue. The driver is vhost even where
    there is none: libvirt ignores it in a domain of type qemu.
    """
    driver = f'<driver name="vhost" queues="{queues}"/>' if queues > 1 else ""
    return f"""<interface type="ethernet">
      <alias name="ua-{nic.network}"/>
      <target dev="{link["ifname"]}" managed="no"/>
      <model type="virtio-non-transitional"/>
      <mac address="{nic.mac or link["address"]}"/>
      <mtu size="{link["mtu"]}"/>
      {driver}
      <rom enabled="no"/>
    </interface>"""


class Daemon(Closing):
    """libvirtd in a pod's network namespace and a mount and process namespace of its own; a context manager.

    nodes: device nodes of the host (/run/vmtap/dev/tapN); the container gets a copy of each as /dev/tapN.
    """

    def __init__(self, pod: Netns, nodes: Sequence[str | os.PathLike[str]] = ()) -> None:
        with contextlib.ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix=f"vmtap-kv-{os.getpid()}-", dir="/run")
            self.folder = Path(stack.enter_context(folder))
            self.pod = pod
            (self.folder / "passwd").write_text(f"root:x:0:0::/:\nqemu:x:{QEMU_USER}:{QEMU_USER}::/:\n")
            (self.folder / "group").write_text(f"root:x:0:\nqemu:x:{QEMU_USER}:\n")
            conf = self.folder / "conf/libvirt"
            conf.mkdir(parents=True)
            # There is no virtlogd, hence the first setting; the others are virt-launcher's.
            (conf / "qemu.conf").write_text(
                'stdio_handler = "file"\nremember_owner = 0\nnamespaces = []\ncgroup_controllers = []\n'
            )
            (conf / "libvirtd.conf").write_text(f'host_uuid = "{uuid.uuid4()}"\n')
            (self.folder / "run/libvirt").mkdir(parents=True)
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, QEMU_USER, QEMU_USER)
            self._log = stack.enter_context(tempfile.TemporaryFile(mode="a+", errors="replace"))
            self._socket = self.folder / "run/libvirt/libvirt-sock"
            self.uri = f"qemu+unix:///session?socket={self._socket}"
            self._process = self._start(nodes)
            stack.callback(self._stop)
            self._stack = stack.pop_all()

    def _start(self, nodes: Sequence[str | os.PathLike[str]]) -> subprocess.Popen[bytes]:
        """Starts the daemon on a socket that listens already, so that a client need not wait for it."""
        env = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(_INSIDE),
            "XDG_RUNTIME_DIR": str(_INSIDE / "run"),
            "XDG_CONFIG_HOME": str(_INSIDE / "conf"),
            "XDG_CACHE_HOME": str(_INSIDE / "cache"),
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "libvirtd.socket",
        }
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self._socket))
            listening.listen()
            os.chown(self._socket, QEMU_USER, QEMU_USER)
            inside = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
            words = [str(QEMU_USER), self.folder, str(len(nodes)), *nodes, "libvirtd"]
            return subprocess.Popen(
                self.pod.argv([*inside, "sh", "-c", _POD, "sh", *words]),
                env=env,
                stdin=listening.fileno(),
                stdout=self._log,
                stderr=self._log,
            )

    def virsh(self, *words: str) -> str:
        """Runs virsh and returns its output. Raises LabError with the daemon's log if it fails."""
        try:
            return run(["virsh", "-q", "-c", self.uri, *words], timeout=PATIENCE).stdout
        except LabError as error:
            raise LabError(f"{error}{self.tail()}") from error

    def processes(self, name: str) -> list[int]:
        """The pids, in the host's namespace, of the pod's processes of that name."""
        init = Path(f"/proc/{self._process.pid}/ns/pid_for_children").readlink()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                if (entry / "ns/pid").readlink() == init and (entry / "comm").read_text().strip() == name:
                    found.append(int(entry.name))
        return found

    def tail(self) -> str:
        """The end of the daemon's and QEMU's output, for an error message."""
        self._log.seek(0)
        logs = [self._log.read()]
        logs += [log.read_text(errors="replace") for log in self.folder.glob("cache/libvirt/qemu/log/*")]
        return (
            f"; the output of libvirtd and QEMU ends with: {' … '.join(log.strip()[-_TAIL:] for log in logs)}"
        )

    def _stop(self) -> None:
        """Kills the first process of the pid namespace. The kernel reports its end when all others have ended."""
        pid = self._process.pid
        first = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        for process in first or [pid]:
            os.kill(process, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Ends the daemon and, with the pid namespace, each of its guests."""
        self._stack.close()


class Domain(Conversation):
    """A started domain whose guest is the lab's; closing it destroys the domain."""

    def __init__(self, daemon: Daemon, image: Image, nics: Iterable[Nic], *, queues: int = 1) -> None:
        super().__init__()
        self._daemon = daemon
        self._name = "default_vm"  # namespace_name
        links = daemon.pod.links()
        words = ["console=ttyS0", "quiet", "panic=-1", "no_timer_check"]
        interfaces = []
        for nic in nics:
            link = links[ifname(nic.network)]
            interfaces.append(interface(link, nic, queues))
            if nic.address:
                words.append(f"nic={nic.mac or link['address']},{nic.address}")
        definition = daemon.folder / "domain.xml"
        definition.write_text(
            f"""<domain type="qemu">
              <name>{self._name}</name>
              <uuid>{uuid.uuid5(uuid.NAMESPACE_DNS, self._name)}</uuid>
              <memory unit="MiB">96</memory>
              <vcpu>{queues}</vcpu>
              <os>
                <type arch="x86_64" machine="q35">hvm</type>
                <kernel>{image.kernel}</kernel>
                <initrd>{image.initramfs}</initrd>
                <cmdline>{" ".join(words)}</cmdline>
              </os>
              <features><acpi/></features>
              <on_reboot>destroy</on_reboot>
              <devices>
                <emulator>/usr/bin/qemu-system-x86_64</emulator>
                {"".join(interfaces)}
                <controller type="usb" model="none"/>
                <memballoon model="none"/>
                <serial type="file"><source path="{_INSIDE / "console"}"/></serial>
                <channel type="unix">
                  <source mode="bind" path="{_INSIDE / "control"}"/>
                  <target type="virtio" name="vmtap.lab"/>
                </channel>
              </devices>
            </domain>"""
        )
        daemon.virsh("define", str(definition))
        daemon.virsh("start", self._name)
        self._connect()

    @property
    def pid(self) -> int:
        """QEMU's."""
        (pid,) = self._daemon.processes("qemu-system-x86")
        return pid

    def migrate(self, target: Daemon) -> None:
        """Migrates the domain live to another daemon, as virt-handler does. No command may be pending."""
        way = f"unix://{target.folder / 'migration'}"
        self._daemon.virsh("migrate", "--live", "--p2p", "--migrateuri", way, self._name, target.uri)
        self._disconnect()  # from the QEMU that has ended
        self._daemon = target
        self._connect()

    def close(self) -> None:
        with contextlib.suppress(LabError):  # it has powered off
            self._daemon.virsh("destroy", self._name)
        self._disconnect()

    def _connect(self) -> None:
        """Connects to the guest's port. QEMU listens on it before libvirt reports the domain as running."""
        self._ended = False
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(self._daemon.folder / "control"))
        self._listen(self._socket.makefile("w"), self._socket.makefile("r", errors="replace"))

    def _disconnect(self) -> None:
        self._reader.join()
        with contextlib.suppress(OSError):  # a line that the guest did not read before it ended
            self._commands.close()
        self._socket.close()

    def _tail(self) -> str:
        console = self._daemon.folder / "console"
        output = console.read_text(errors="replace").strip()[-_TAIL:] if console.exists() else ""
        return f"; its console ends with: {output}{self._daemon.tail()}"
