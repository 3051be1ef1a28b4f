"""Attachments for the launcher's tests: records as ADD leaves them, in a namespace without a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cni.kernel import netns
from cni.state.record import Record, boot_id
from cni.state.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

LAUNCH = [sys.executable, "-m", "cni.launcher"]
QEMU = ["qemu-system-x86_64", "-accel", "tcg", "-M", "pc", "-m", "64", "-nodefaults", "-display", "none"]
MAC = "02:00:00:00:00:01"


def record(**fields: Any) -> Record:
    """A macvtap with one queue, except for what is said."""
    return Record(
        **{
            "network": "dataplane",
            "container_id": "c0ffee",
            "ifname": "net1",
            "netns": "/run/netns/pod",
            "netns_id": (4, 4026531840),
            "nsid": 0,
            "device": "macvtap",
            "ifindex": 7,
            "mac": MAC,
            "mtu": 1500,
            "queues": 1,
            "boot_id": boot_id(),
            **fields,
        }
    )


def save(folder: Path, record: Record) -> None:
    store = Store(folder)
    store.prepare()
    store.save(record)


@dataclass(frozen=True)
class Pod:
    """A namespace, its path, and the state folder that speaks of it."""

    path: str
    folder: Path

    def ip(self, command: str) -> str:
        return _run("nsenter", f"--net={self.path}", "ip", "-j", *command.split())

    def attach(self, ifname: str, **fields: Any) -> Record:
        """Records the link of that name as an attachment."""
        [link] = json.loads(self.ip(f"link show {ifname}"))
        fd = netns.open_path(self.path)
        try:
            made = record(
                ifname=ifname,
                netns=self.path,
                netns_id=netns.identity(fd),
                ifindex=link["ifindex"],
                **{"mac": link["address"], "mtu": link["mtu"], **fields},
            )
        finally:
            os.close(fd)
        save(self.folder, made)
        return made

    def macvtap(self, ifname: str, **fields: Any) -> Record:
        self.ip(f"link add {ifname}-lower type veth peer name {ifname}-peer")
        self.ip(f"link set {ifname}-lower up")
        self.ip(f"link set {ifname}-peer up")
        self.ip(f"link add link {ifname}-lower name {ifname} type macvtap mode bridge")
        self.ip(f"link set {ifname} up")
        return self.attach(ifname, **fields)

    def tap(self, ifname: str, queues: int) -> Record:
        self.ip(f"tuntap add {ifname} mode tap vnet_hdr {'multi_queue' if queues > 1 else ''}")
        self.ip(f"link set {ifname} up")
        return self.attach(ifname, device="tap", queues=queues, mac=MAC)  # a tap's own is not the guest's


@contextmanager
def pod(folder: Path) -> Iterator[Pod]:
    """It lives as long as a process that waits for its stdin to close, so nothing can be left behind."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo there; read end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == b"there\n"
        yield Pod(f"/proc/{holder.pid}/ns/net", folder)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
