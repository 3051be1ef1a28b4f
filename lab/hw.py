"""A machine with SR-IOV NICs, all emulated: Debian's kernel, two PFs with seven VFs each, a program of this checkout.

    pf0, pf1    QEMU's igb, each alone on a wire whose other end is
    wire0, wire1    a NIC of the same machine

Its root is the host's, read-only, with a new /tmp, /run and /dev: no image has to be built, and the programs of
this checkout are there. Inside, one of them answers the host's requests: pytest, which runs one test of tests/hw for
each (tests/hw/conftest.py), or the benchmark (lab/bench/emulated.py). Everything that waits has a deadline. Must not
know what a request means.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.assets import hardware
from lab.assets.cache import CACHE, CHECKOUT
from lab.process import PATIENCE, Closing, LabError, run
from lab.wire import Netns

if TYPE_CHECKING:
    from collections.abc import Iterator

NICS = {"pf0": "52:54:00:00:01:00", "pf1": "52:54:00:00:02:00"}
"""The MACs of the PFs. The PF driver chooses those of the VFs."""
WIRES = {"wire0": "52:54:00:00:01:01", "wire1": "52:54:00:00:02:01"}
"""The NICs at the other end of each PF's wire, in the same order."""
BOOT_DEADLINE = 2 * PATIENCE
"""Seconds. A boot takes ten on an idle machine."""
TEST_DEADLINE = 3 * PATIENCE
_LOG_TAIL = 3000
PYTEST = "-m pytest -p no:cacheprovider -p no:xdist"
"""Python's arguments that start pytest inside."""
_MARK = "vmtap_program="
_PORT = "vport*p1"


def inside() -> bool:
    """Whether this is the emulated machine."""
    return _MARK in Path("/proc/cmdline").read_text()


class Root(Netns):
    """Inside: the first namespace, where a driver's links appear, and so the node."""

    def __init__(self) -> None:
        self.path = Path("/proc/1/ns/net")

    def close(self) -> None:
        """It stays."""


def name_all() -> None:
    """Inside: gives the NICs their names, since the kernel's depend on which was found first."""
    by_mac = {mac: name for name, mac in (NICS | WIRES).items()}
    for link in json.loads(run(["ip", "-j", "link", "show"]).stdout):
        if name := by_mac.get(link.get("address")):
            run(["ip", "link", "set", link["ifname"], "name", name, "up"])


def requests() -> Iterator[tuple[list[Any], Any]]:
    """Inside: the host's requests, each with a function that sends one answer. Ends when the host hangs up."""
    (path,) = Path("/dev").glob(_PORT)
    with path.open("r+b", buffering=0) as port:

        def answer(value: object) -> None:
            left = json.dumps(value).encode() + b"\n"
            while left:
                left = left[port.write(left) :]

        answer("ready")
        while line := port.readline():
            yield json.loads(line), answer


class Machine(Closing):
    """A started machine; close() ends it. program: Python's arguments for the program inside."""

    def __init__(self, program: str) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._lines = ours.makefile("rb")
        self._log = tempfile.TemporaryFile(mode="a+", errors="replace")  # noqa: SIM115 - until close()
        with theirs:
            self._process = subprocess.Popen(
                _command(hardware.files(), program, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
            )
        try:
            if self._receive(BOOT_DEADLINE) != "ready":
                raise LabError(f"the emulated machine did not boot{self._tail()}")
        except BaseException:
            self.close()
            raise

    def ask(self, *request: object) -> Iterator[Any]:
        """Sends a request and yields its answers. A null ends them and is not yielded."""
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise LabError(f"the emulated machine has ended{self._tail()}") from error
        while (answer := self._receive(TEST_DEADLINE)) is not None:
            yield answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._lines.close()
        self._socket.close()
        self._log.close()

    def _receive(self, seconds: float) -> Any:
        self._socket.settimeout(seconds)
        line = b""
        with contextlib.suppress(ConnectionError):
            try:
                line = self._lines.readline()
            except TimeoutError as error:
                raise LabError(f"no answer in {seconds:g} s{self._tail()}") from error
        if not line:
            raise LabError(f"the emulated machine has ended{self._tail()}")
        return json.loads(line)

    def _tail(self) -> str:
        self._log.seek(0)
        return f"; its console ends with: {self._log.read().strip()[-_LOG_TAIL:]}"


def _command(made: hardware.Hardware, program: str, control: int) -> list[str]:
    words = {
        "vmtap_checkout": CHECKOUT,
        "vmtap_cache": CACHE.resolve(),
        "vmtap_python": sys.executable,
        _MARK.rstrip("="): f'"{program}"',  # the kernel removes the quotes
    }
    command = [
        os.fspath(made.qemu),
        *(word for folder in made.firmware for word in ("-L", os.fspath(folder))),
        # Always tcg: /dev/kvm may exist and be unable to run this kernel. One CPU: with more, QEMU 10.0 sometimes
        # crashes (iotlb_to_section) when one CPU accesses a device while another maps the memory of a new VF.
        *("-accel", "tcg", "-M", "q35", "-smp", "1", "-m", "1024", "-nodefaults", "-no-user-config"),
        *("-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", os.fspath(made.boot.kernel), "-initrd", os.fspath(made.boot.initramfs), "-append"),
        # no_timer_check: on a busy machine an emulated timer is late, and the kernel would panic.
        "console=ttyS0 quiet panic=-1 no_timer_check net.ifnames=0 bonding.max_bonds=0 dummy.numdummies=0 "
        + " ".join(f"{name}={value}" for name, value in words.items()),
        *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        *("-chardev", f"socket,id=control,fd={control}", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=control"),
    ]
    for number, (mac, end) in enumerate(zip(NICS.values(), WIRES.values(), strict=True)):
        command += [
            *("-netdev", f"hubport,id=pf{number},hubid={number}"),
            *("-netdev", f"hubport,id=wire{number},hubid={number}"),
            *("-device", f"pcie-root-port,id=root{number},chassis={number}"),
            *("-device", f"igb,bus=root{number},netdev=pf{number},mac={mac},romfile="),
            *("-device", f"virtio-net-pci,netdev=wire{number},mac={end},romfile="),
        ]
    return command
