# PYTHON_ARGCOMPLETE_OK
"""The command vmtapctl: its arguments, and errors as one line and an exit status.

docs/vmtapctl.md lists the exit statuses. commands.py carries the commands out; it is loaded after the arguments are
parsed, because a shell that completes a word runs this file.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys

from cni import spec
from cni.ctl import locations, stream
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn


PROGRAM = "vmtapctl"
BIN_DIR = "/opt/cni/bin"
EXIT = {
    spec.INVALID_ENVIRONMENT: os.EX_USAGE,
    spec.NO_ATTACHMENT: os.EX_NOINPUT,
    spec.SOURCE_MISSING: os.EX_NOINPUT,
    spec.IO_FAILURE: os.EX_IOERR,
    spec.TRY_AGAIN_LATER: os.EX_TEMPFAIL,
}
"""sysexits.h, as vmtap-launch has them. Any other error is EX_SOFTWARE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    with stream.escaping():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a command without a traceback
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete  # noqa: PLC0415

        argcomplete.autocomplete(parser, always_complete_options=False)
    options = parser.parse_args(argv)
    from cni.ctl import commands  # noqa: PLC0415 - 150 ms that completions and --help do not wait for

    try:
        status = commands.COMMANDS[options.command](options)
        sys.stdout.flush()
    except CniError as error:
        return _fail(str(error), EXIT.get(error.code, os.EX_SOFTWARE))
    except PermissionError as error:
        return _fail(f"{reason(error)}: run it as root", os.EX_NOPERM)
    except OSError as error:
        return _fail(f"system call failed: {reason(error)}", os.EX_OSERR)
    return status


def make_parser() -> argparse.ArgumentParser:
    """All commands and options; docs and completions are made from it."""
    parser = _Parser(
        prog=PROGRAM,
        description="Shows the attachments of this node, their devices, pods and VMs, and checks the node. "
        "Only install and uninstall change the node; probe sends frames, capture records them.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, text: str, *, places: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(command=name)
        if name != "completion":
            made.add_argument("--json", action="store_true", help="print JSON")
        if places:
            made.add_argument(
                "--run",
                metavar="FOLDER",
                help="folder of state and sockets; default: VMTAP_RUN, else the agent's",
            )
            made.add_argument(
                "--policy", metavar="FILE", help="the node's policy; default: VMTAP_POLICY, else the agent's"
            )
            made.add_argument("--config", metavar="FILE", help="the agent's configuration file")
        return made

    made = command("list", "list the attachments, one a line")
    made.add_argument("--wide", action="store_true", help="show all columns")
    made = command("show", "show all details of attachments, and their traffic")
    argument: Any = made.add_argument(
        "what", metavar="ID|POD|IFNAME", help="or a VM, a MAC or a container id"
    )
    argument.completer = _names
    made = command("tree", "show switch ports, NICs, attachments, pods and VMs as a tree")
    made.add_argument("--svg", metavar="FILE", help="write an SVG picture instead; - is stdout")
    made.add_argument(
        "--lldp",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="listen for LLDP so long; without it, only lldpd is queried, if it runs",
    )
    command("watch", "print changes of attachments until Ctrl-C")
    made = command("capture", "capture the frames that a guest sends and receives")
    _capture_options(made)
    made = command("doctor", "check the node, and print the next step for each fault")
    made.add_argument("--strict", action="store_true", help="exit with 1 for warnings, too")
    made = command("probe", "test whether the switch has reflective relay, which mode vepa needs")
    argument = made.add_argument("source", metavar="SOURCE", help="a NIC, bond, VLAN or bridge of this node")
    argument.completer = _devices
    made.add_argument(
        "--lldp",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="then listen for LLDP so long (EVB TLV); most switches send it every 30 s",
    )
    made = command("trace", "show whether two VMs can reach each other, and why not")
    argument = made.add_argument(
        "ends",
        metavar="VM",
        nargs=2,
        help="a VM, pod, IFNAME, POD/IFNAME, id, MAC or address; one of the two may be the MAC or address of a machine "
        "that is not on this node",
    )
    argument.completer = _names
    made = command("lint", "check network configs, policies, agent's files and manifests", places=False)
    made.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="a network config (JSON), a policy or an agent's file (YAML), or manifests",
    )
    made.add_argument(
        "--policy", metavar="FILE", help="also check that this policy allows the network configs"
    )
    made = command("install", "install the shim in the container runtime's CNI folder", places=False)
    made.add_argument("--bin-dir", metavar="FOLDER", default=BIN_DIR, help=f"default: {BIN_DIR}")
    made.add_argument(
        "--as",
        metavar="NAME",
        dest="names",
        action="append",
        default=["vmtap"],
        choices=("macvtap", "vmtap-hook"),
        help="install it under this name, too: macvtap, for network configs of kubevirt/macvtap-cni; vmtap-hook, for "
        "containers with a device of a resource claim",
    )
    made = command("uninstall", "remove the shim from that folder")
    made.add_argument("--bin-dir", metavar="FOLDER", default=BIN_DIR, help=f"default: {BIN_DIR}")
    made.add_argument(
        "--state", action="store_true", help="also remove the state folder and vmtap's CDI files"
    )
    made.add_argument("--force", action="store_true", help="even if pods are attached, or an agent runs")
    made = command("completion", "print the completion script of a shell", places=False)
    made.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _capture_options(made: argparse.ArgumentParser) -> None:
    argument: Any = made.add_argument(
        "what", metavar="VM", help="or a pod, a MAC, an attachment's id or its container's"
    )
    argument.completer = _names
    made.add_argument(
        "filter",
        metavar="FILTER",
        nargs="*",
        help="as in pcap-filter(7), such as: arp or port 67; needs libpcap",
    )
    made.add_argument(
        "--write", metavar="FILE", help="write pcapng to a new file; - is stdout, for wireshark -k -i -"
    )
    made.add_argument(
        "--direction", choices=("in", "out"), help="only what the guest receives, or what it sends"
    )
    made.add_argument("--count", metavar="N", type=_number(1), help="end after that many frames")
    made.add_argument(
        "--seconds", metavar="N", type=_number(1), default=3600, help="end after that time; default: 3600"
    )
    made.add_argument(
        "--size",
        metavar="BYTES",
        type=_number(10_000),
        help="end before more is written; also as 20k, 20M, 20G; default for a file: 100M",
    )
    made.add_argument(
        "--snap",
        metavar="BYTES",
        type=_number(14, 1 << 18),
        default=1 << 18,
        help="keep only the beginning of each frame; default: 262144",
    )


def _names(prefix: str, **_: Any) -> list[str]:
    """The names of attachments that begin with prefix, for completion. A state folder that cannot be read has none."""
    from cni.ctl import snapshot  # noqa: PLC0415 - for completion only
    from cni.ctl.inventory import Attachment  # noqa: PLC0415

    try:
        records, _bad = snapshot.read_records(locations.load(run=None, policy=None, file=None).run)
    except CniError:
        return []
    found = {name for record, since in records for name in Attachment(record, since, "old").names}
    return sorted(name for name in found if name.startswith(prefix))


def _devices(prefix: str, **_: Any) -> list[str]:
    """The names of the node's links that begin with prefix, for completion."""
    return [name for _, name in socket.if_nameindex() if name.startswith(prefix)]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError("must be from 1 to 600")
    return value


def _number(least: int, most: int = 10**15) -> Callable[[str], int]:
    """A converter of options: a number from least to most, which may end with k, M or G."""

    def convert(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,15})([kMG]?)", text)
        value = int(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[match[2]] if match else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a number from {least} to {most}")
        return value

    return convert


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As the base class. Takes a FILTER behind an option, too, which argparse does from Python 3.13."""
        found, rest = super().parse_known_args(args, namespace)
        if hasattr(found, "filter") and not found.filter and not any(word.startswith("-") for word in rest):
            found.filter, rest = rest, []
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(os.EX_USAGE, f"{PROGRAM}: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
