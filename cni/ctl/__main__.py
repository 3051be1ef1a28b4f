# PYTHON_ARGCOMPLETE_OK
"""The command vmtapctl: its arguments, and errors as one line and an exit status.

docs/vmtapctl.md lists the exit statuses. commands.py carries the commands out; it is loaded after the arguments are
parsed, because a shell that completes a word runs this file.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys

from cni import spec
from cni.ctl import locations
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
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
        return _fail(f"{error}: run it as root", os.EX_NOPERM)
    except OSError as error:
        return _fail(f"the system refused it: {error}", os.EX_OSERR)
    return status


def make_parser() -> argparse.ArgumentParser:
    """All commands and options; docs and completions are made from it."""
    parser = _Parser(
        prog=PROGRAM,
        description="What vmtap has attached on this node, to what, for whom, and what is wrong. "
        "Only install and uninstall change anything; probe sends frames.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, text: str, *, places: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(command=name)
        if name != "completion":
            made.add_argument("--json", action="store_true", help="for programs")
        if places:
            made.add_argument(
                "--run", metavar="FOLDER", help="state and sockets; default: as the agent has it"
            )
            made.add_argument(
                "--policy", metavar="FILE", help="the node's policy; default: as the agent has it"
            )
            made.add_argument("--config", metavar="FILE", help="the agent's file")
        return made

    made = command("list", "every attachment, one a line")
    made.add_argument("--wide", action="store_true", help="more columns")
    made = command("show", "everything about some attachments, and their traffic")
    argument: Any = made.add_argument(
        "what", metavar="ID|POD|IFNAME", help="also a VM, a MAC or a container id"
    )
    argument.completer = _names
    made = command("tree", "switch port, NIC, attachment, pod and VM as a tree")
    made.add_argument("--svg", metavar="FILE", help="draw a picture instead, for a ticket; - is stdout")
    made.add_argument(
        "--lldp",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="wait that long for switches to say who they are; lldpd is asked anyway, where it runs",
    )
    command("watch", "what comes and goes, as it happens, until Ctrl-C")
    command("doctor", "what is wrong on this node, and what to do about it")
    made = command("probe", "does the switch behind a source device reflect, as vepa needs it?")
    argument = made.add_argument("source", metavar="SOURCE", help="a NIC, bond, VLAN or bridge of this node")
    argument.completer = _devices
    made.add_argument(
        "--lldp",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="wait that long for what switches say of it (EVB TLV); most announce every 30 s",
    )
    made = command("lint", "check network configs and policy files before a node meets them", places=False)
    made.add_argument("files", metavar="FILE", nargs="+", help="JSON is a network config, YAML a policy")
    made.add_argument("--policy", metavar="FILE", help="would this policy allow them?")
    made = command("install", "put the shim into the container runtime's CNI folder", places=False)
    made.add_argument("--bin-dir", metavar="FOLDER", default=BIN_DIR, help=f"default: {BIN_DIR}")
    made.add_argument(
        "--as",
        metavar="NAME",
        dest="names",
        action="append",
        default=["vmtap"],
        choices=("macvtap",),
        help="under this name as well: macvtap, for the network configs of kubevirt/macvtap-cni",
    )
    made = command("uninstall", "take the shim out of that folder, and nothing else")
    made.add_argument("--bin-dir", metavar="FOLDER", default=BIN_DIR, help=f"default: {BIN_DIR}")
    made.add_argument("--state", action="store_true", help="the state folder and our CDI files go, too")
    made.add_argument("--force", action="store_true", help="also if pods are attached, or an agent runs")
    made = command("completion", "print the completion script of a shell", places=False)
    made.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


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


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(os.EX_USAGE, f"{PROGRAM}: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
