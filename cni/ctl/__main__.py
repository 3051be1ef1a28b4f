# PYTHON_ARGCOMPLETE_OK
"""The command vmtapctl: arguments, dispatch, errors as one line and an exit code.

docs/vmtapctl.md has the exit codes and the JSON. A command imports what it needs when it runs: a shell that asks
for completions waits for this file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

from cni import spec
from cni.ctl import locations
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, NoReturn

    from cni.ctl.inventory import Attachment
    from cni.ctl.locations import Settings

PROGRAM = "vmtapctl"
BIN_DIR = "/opt/cni/bin"
WARNINGS = 1
ERRORS = 2
REFLECTS = {True: 0, False: 1, None: 2}
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
    try:
        status: int = options.command(options)
        sys.stdout.flush()
    except CniError as error:
        return _fail(str(error), EXIT.get(error.code, os.EX_SOFTWARE))
    except PermissionError as error:
        return _fail(f"{error}: run it as root", os.EX_NOPERM)
    except OSError as error:
        return _fail(f"the system says no: {error}", os.EX_OSERR)
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

    def command(name: str, function: Any, text: str, *, places: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(command=function)
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

    made = command("list", _list, "every attachment, one a line")
    made.add_argument("--wide", action="store_true", help="more columns")
    made = command("show", _show, "everything about some attachments, and their traffic")
    argument: Any = made.add_argument(
        "what", metavar="ID|POD|IFNAME", help="also a VM, a MAC or a container id"
    )
    argument.completer = _names
    made = command("tree", _tree, "switch port, NIC, attachment, pod and VM as a tree")
    made.add_argument("--svg", metavar="FILE", help="draw a picture instead, for a ticket; - is stdout")
    made.add_argument(
        "--lldp",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="wait that long for switches to say who they are; lldpd is asked anyway, where it runs",
    )
    command("watch", _watch, "what comes and goes, as it happens, until Ctrl-C")
    command("doctor", _doctor, "what is wrong on this node, and what to do about it")
    made = command("probe", _probe, "does the switch behind a source device reflect, as vepa needs it?")
    argument = made.add_argument("source", metavar="SOURCE", help="a NIC, bond, VLAN or bridge of this node")
    argument.completer = _devices
    made.add_argument(
        "--lldp",
        metavar="SECONDS",
        type=_seconds,
        default=0.0,
        help="wait that long for what switches say of it (EVB TLV); most announce every 30 s",
    )
    made = command(
        "lint", _lint, "check network configs and policy files before a node meets them", places=False
    )
    made.add_argument("files", metavar="FILE", nargs="+", help="JSON is a network config, YAML a policy")
    made.add_argument("--policy", metavar="FILE", help="would this policy allow them?")
    made = command("install", _install, "put the shim into the container runtime's CNI folder", places=False)
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
    made = command("uninstall", _uninstall, "take the shim out of that folder, and nothing else")
    made.add_argument("--bin-dir", metavar="FOLDER", default=BIN_DIR, help=f"default: {BIN_DIR}")
    made.add_argument("--state", action="store_true", help="the state folder and our CDI files go, too")
    made.add_argument("--force", action="store_true", help="also if pods are attached, or an agent runs")
    made = command("completion", _completion, "print the completion script of a shell", places=False)
    made.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _list(options: argparse.Namespace) -> int:
    from cni.ctl import inventory, render  # noqa: PLC0415

    node = inventory.take(_settings(options))
    if options.json:
        return _json({key: node.document()[key] for key in ("node", "time", "attachments", "unreadable")})
    render.say(render.attachments(node.attachments, render.console(), wide=options.wide))
    if node.unreadable:
        print(f"{PROGRAM}: unreadable: {', '.join(node.unreadable)}; see doctor", file=sys.stderr)
    return 0


def _show(options: argparse.Namespace) -> int:
    from cni.ctl import inventory, render  # noqa: PLC0415

    node = inventory.take(_settings(options))
    found = [each for each in node.attachments if options.what in names(each)]
    if not found:
        found = [each for each in node.attachments if _begins(each, options.what)]
    if not found:
        known = sorted({each.sandbox for each in node.attachments})
        there = f"there is {', '.join(known)}" if known else "nothing is attached on this node"
        raise CniError(spec.NO_ATTACHMENT, f"no attachment is or belongs to {options.what!r}; {there}")
    if options.json:
        return _json({"attachments": [each.document() for each in found]})
    for number, each in enumerate(found):
        if number:
            print()
        render.say(render.details(each))
    return 0


def _tree(options: argparse.Namespace) -> int:
    from cni.ctl import inventory, lldp, picture, render  # noqa: PLC0415

    found = _settings(options)
    neighbours = lldp.known()
    if options.lldp:
        nics = {nic for source in inventory.take(found).sources for nic in source.nics} - neighbours.keys()
        neighbours |= lldp.listen(sorted(nics), options.lldp)
    node = inventory.take(found, neighbours)
    if options.json:
        _json(node.document())
    if options.svg:
        drawn = picture.draw(node)
        if options.svg == "-":
            sys.stdout.write(drawn)
        else:
            with open(options.svg, "w", encoding="utf-8") as file:
                file.write(drawn)
    elif not options.json:
        render.say(render.tree(node))
    return 0


def _watch(options: argparse.Namespace) -> int:
    from cni.ctl import watch  # noqa: PLC0415

    return watch.run(_settings(options), as_json=options.json)


def _doctor(options: argparse.Namespace) -> int:
    from cni.ctl import doctor, render  # noqa: PLC0415

    found = doctor.examine(_settings(options, complain=False))
    count = {severity: sum(each.severity == severity for each in found) for severity in render.SEVERITY}
    status = ERRORS if count["error"] else WARNINGS if count["warning"] else 0
    if options.json:
        _json({"findings": [each.document() for each in found], **count})
        return status
    render.say(render.findings(found, terminal=render.console().is_terminal))
    print(
        f"\n{render.count(count['error'], 'error')}, {render.count(count['warning'], 'warning')}, {count['ok']} ok"
    )
    return status


def _probe(options: argparse.Namespace) -> int:
    from cni.ctl import probe, render  # noqa: PLC0415

    found = probe.run(options.source, _settings(options).run, options.lldp)
    if options.json:
        _json(found.document())
    else:
        render.say(render.probe(found))
    return REFLECTS[found.found.reflects]


def _lint(options: argparse.Namespace) -> int:
    from cni.ctl import lint  # noqa: PLC0415

    rules = lint.read_policy(options.policy) if options.policy else None
    found = [lint.check(path, rules) for path in options.files]
    if options.json:
        _json({"files": [each.document() for each in found]})
    else:
        for each in found:
            for fault in each.faults:
                print(f"{each.file}: {fault}")
            if not each.faults:
                print(f"{each.file}: a good {each.kind}")
    return ERRORS if any(each.faults for each in found) else 0


def _install(options: argparse.Namespace) -> int:
    from cni.ctl import installation  # noqa: PLC0415

    return _done(installation.install(options.bin_dir, options.names), as_json=options.json)


def _uninstall(options: argparse.Namespace) -> int:
    from cni.ctl import installation  # noqa: PLC0415

    found = _settings(options)
    steps = installation.uninstall(
        options.bin_dir, found.run, found.cdi, state=options.state, force=options.force
    )
    return _done(steps, as_json=options.json)


def _done(steps: Iterable[str], *, as_json: bool) -> int:
    """Say each as it is done: what comes after it may fail."""
    said = []
    for step in steps:
        said.append(step)
        if not as_json:
            print(step, flush=True)
    return _json({"done": said}) if as_json else 0


def _completion(options: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode  # noqa: PLC0415

    print(shellcode([PROGRAM], shell=options.shell))
    return 0


def names(each: Attachment) -> set[str]:
    """What `show` knows an attachment by."""
    record = each.record
    found = {record.id, record.ifname, record.mac, record.container_id, record.network, each.sandbox}
    found |= {each.pod.name} if each.pod else set()
    return found | ({each.vm} if each.vm else set())


def _begins(each: Attachment, what: str) -> bool:
    """An id cut short, as people copy them."""
    return len(what) >= 4 and any(
        text.startswith(what) for text in (each.record.id, each.record.container_id)
    )


def _names(prefix: str, **_: Any) -> list[str]:
    """For the shell; as nothing can be said there, nothing is."""
    from cni.ctl import inventory  # noqa: PLC0415

    try:
        records, _bad = inventory.read_records(locations.load(run=None, policy=None, file=None).run)
    except CniError:
        return []
    found = {name for record, since in records for name in names(inventory.Attachment(record, since, "old"))}
    return sorted(name for name in found if name.startswith(prefix))


def _devices(prefix: str, **_: Any) -> list[str]:
    import socket  # noqa: PLC0415

    return [name for _, name in socket.if_nameindex() if name.startswith(prefix)]


def _settings(options: argparse.Namespace, *, complain: bool = True) -> Settings:
    found = locations.load(run=options.run, policy=options.policy, file=options.config)
    if found.fault and complain:
        print(f"{PROGRAM}: {found.fault}; going by its defaults", file=sys.stderr)
    return found


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError("must be from 1 to 600")
    return value


def _json(document: dict[str, Any]) -> int:
    print(json.dumps(document, indent=2, ensure_ascii=False))
    return 0


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(os.EX_USAGE, f"{PROGRAM}: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
