"""The command vmtap-launch: arguments, the order of a start, errors as one line and an exit code.

    options, root or broker?, QEMU?, attachments → queues, vhost, seed → no privilege → exec, or fork and supervise

The queues come from the node agent where its socket is there (broker.py), and are opened here where it is not.

docs/launcher.md has the exit codes. Imports what every start needs; the rest only when it is asked for.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys

from cni import spec
from cni.errors import CniError
from cni.kernel import netns, tapdev
from cni.launcher import NO_VHOST, NOT_PERMITTED, QEMU_NOT_EXECUTABLE, QEMU_NOT_FOUND, privilege, qemu
from cni.launcher.privilege import User
from cni.state.store import in_netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import NoReturn

    from cni.launcher.broker_client import Described
    from cni.state.record import Record

    Attachments = Sequence[tuple[Described, int]]
    Take = Callable[[str], list[int]]

PROGRAM = "vmtap-launch"
DEFAULT_USER = User(107, 107)
"""The user that KubeVirt runs QEMU as."""
VHOST = "/dev/vhost-net"
DEADLINE = 30.0

EXIT = {
    spec.INVALID_ENVIRONMENT: os.EX_USAGE,
    spec.INVALID_NETNS: os.EX_NOINPUT,
    spec.NO_ATTACHMENT: os.EX_UNAVAILABLE,
    spec.WRONG_DEVICE: os.EX_UNAVAILABLE,
    NO_VHOST: os.EX_UNAVAILABLE,
    spec.IO_FAILURE: os.EX_IOERR,
    spec.DEVICE_BUSY: os.EX_TEMPFAIL,
    spec.TRY_AGAIN_LATER: os.EX_TEMPFAIL,
    NOT_PERMITTED: os.EX_NOPERM,
    QEMU_NOT_EXECUTABLE: 126,
    QEMU_NOT_FOUND: 127,
}
"""sysexits.h, and what a shell says of a command that it cannot run. Any other error is EX_SOFTWARE."""

PACKAGES = {
    "x86_64": "qemu-system-x86",
    "i386": "qemu-system-x86",
    "aarch64": "qemu-system-arm",
    "arm": "qemu-system-arm",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, if it returns: without --supervise the process becomes QEMU."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a start without a traceback
    try:
        return launch(sys.argv[1:] if argv is None else argv, os.environ)
    except CniError as error:
        return _fail(str(error), EXIT.get(error.code, os.EX_SOFTWARE))
    except OSError as error:
        return _fail(f"the system says no: {error}", os.EX_OSERR)
    except Exception as error:  # one line and an exit code, whatever happens
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?"
        return _fail(f"internal error, please report it: {error!r} at {where}", os.EX_SOFTWARE)


def launch(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """One start. Returns after --print and --supervise only. Raises CniError."""
    options, users = parse(argv)
    user, broker = _user(options.user), _broker(options, env)
    if os.geteuid() != 0 and broker is None:
        raise CniError(
            NOT_PERMITTED,
            f"must start as root, not as uid {os.geteuid()}, or with the node agent's broker: is it mounted here?",
        )
    path = find(users[0], env)
    _fill_stdio()
    attachments, take = _from_broker(broker, options) if broker else _local(options, env)
    vhost = vhost_wanted(options.vhost)
    command = qemu.command(users, attachments, vhost=vhost, seeded=options.seed, supervised=options.supervise)
    if options.print:
        print(shlex.join(command))
        return os.EX_OK

    fds = []
    for record, queues in attachments:
        fds += take(record.ifname)
        fds += [os.open(VHOST, os.O_RDWR | os.O_CLOEXEC) for _ in range(queues if vhost else 0)]
    if options.seed:
        from cni.launcher import seed  # noqa: PLC0415 - pycdlib costs more than all the rest

        fds.append(seed.make([record for record, _ in attachments]))

    def become_qemu() -> NoReturn:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python has them ignored
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execve(path, command, privilege.environment(env))  # noqa: S606
        except OSError as error:
            raise CniError(QEMU_NOT_EXECUTABLE, f"{path} cannot be run as {user}", str(error)) from error

    if options.supervise:
        return _supervise(become_qemu, fds, user, options.deadline)
    privilege.place(fds)
    privilege.drop(user)
    return become_qemu()


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the QEMU command as the user wrote it after "--". Raises CniError; --help exits."""
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options = _parser().parse_args(argv[:split])
    users = argv[split + 1 :]
    wrong = None
    if not users:
        wrong = f"the QEMU command is missing; end with: -- qemu-system-{os.uname().machine} ARGS"
    elif len(set(options.ifname)) < len(options.ifname):
        wrong = "--ifname names one attachment twice"
    elif options.deadline is not None and not options.supervise:
        wrong = "--deadline is for --supervise: without it the launcher becomes QEMU and has no say"
    elif options.supervise and {"-daemonize", "--daemonize"} & set(users):
        wrong = "QEMU's -daemonize runs away from --supervise; leave one of them out"
    elif options.netns and (options.broker or options.shared):
        wrong = "--broker and --shared are for the namespace that this runs in; leave --netns out"
    if wrong:
        raise CniError(spec.INVALID_ENVIRONMENT, wrong)
    return options, users


def select(records: Sequence[Record], ifnames: Sequence[str], where: str) -> list[Record]:
    """The attachments that are asked for, in the order asked for; without names all. Raises CniError."""
    if not records:
        raise CniError(
            spec.NO_ATTACHMENT,
            f"no attachment in {where}: let a runtime or cnitool add one, or give another --netns",
        )
    by_name = {record.ifname: record for record in records}
    missing = [name for name in ifnames if name not in by_name]
    if missing:
        raise CniError(
            spec.NO_ATTACHMENT,
            f"no attachment {', '.join(missing)} in {where}; there is {', '.join(by_name)}",
        )
    return [by_name[name] for name in ifnames or by_name]


def queue_count(record: Record, wanted: int | None) -> int:
    """How many queues to open: as many as ADD made room for, or fewer. Raises CniError."""
    if wanted is not None and wanted > record.queues:
        raise CniError(
            spec.INVALID_ENVIRONMENT,
            f'--queues {wanted}: {record.ifname} has {record.queues}, by "queues" of its network config',
        )
    return wanted or record.queues


def vhost_wanted(choice: str, device: str = VHOST) -> bool:
    """Whether to use it; "auto" is where it can be opened. Raises CniError NO_VHOST for a vain "on"."""
    if choice == "off":
        return False
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if choice == "auto":
            return False
        raise CniError(
            NO_VHOST,
            f"--vhost on: {device} cannot be opened; load the module vhost_net or use --vhost auto",
            str(error),
        ) from None
    return True


def find(program: str, env: Mapping[str, str]) -> str:
    """The path of the program, looked up in PATH as a shell does. Raises CniError."""
    folders = [""] if "/" in program else os.get_exec_path(env)
    found = [path for path in (os.path.join(folder, program) for folder in folders) if os.path.isfile(path)]
    runnable = [path for path in found if os.access(path, os.X_OK)]
    if runnable:
        return runnable[0]
    if found:
        raise CniError(
            QEMU_NOT_EXECUTABLE, f"{found[0]} is not executable: chmod +x it, or name another program"
        )
    package = PACKAGES.get(os.path.basename(program).removeprefix("qemu-system-"), "qemu-system")
    raise CniError(
        QEMU_NOT_FOUND, f"{program} is not installed: apt-get install --no-install-recommends {package}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [options] -- qemu-system-… ARGS",
        description="Gives QEMU the attachments of a network namespace as open fds, and no privilege.",
        epilog="Exit codes and examples: docs/launcher.md",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100),  # else it imports shutil
    )
    add = parser.add_argument
    add("--netns", metavar="PATH", help="the pod's network namespace; default: the one that this runs in")
    add(
        "--broker",
        metavar="PATH",
        help="the node agent's socket; default: $VMTAP_BROKER or /run/vmtap/launcher/broker.sock, if it is there",
    )
    add("--shared", action="store_true", help="take the queues even if another launcher of the pod has some")
    add("--ifname", metavar="NAME", action="append", default=[], help="only this attachment; may be repeated")
    add(
        "--user",
        metavar="USER[:GROUP]",
        type=privilege.parse_user,
        help=f"for root; default: {DEFAULT_USER}",
    )
    add(
        "--queues",
        metavar="N",
        type=_whole,
        help="open N queues of each attachment; default: all that it has",
    )
    add(
        "--vhost",
        choices=("on", "off", "auto"),
        default="auto",
        help="default: auto, on where the host has it",
    )
    add("--seed", action="store_true", help="give the guest its addresses as a NoCloud seed (cloud-init)")
    add("--supervise", action="store_true", help="stay as parent: signals become a power-down")
    add(
        "--deadline", metavar="SECONDS", type=_seconds, help=f"from power-down to quit; default: {DEADLINE:g}"
    )
    add("--print", action="store_true", help="show the command that would run, and open nothing")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CniError(spec.INVALID_ENVIRONMENT, f"{message}; see {PROGRAM} --help")


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1 up")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to 86400 seconds")
    return seconds


def _user(asked: User | None) -> User:
    """Whom QEMU runs as. Raises CniError if that cannot be."""
    if os.geteuid() == 0:
        return asked or DEFAULT_USER
    own = User(os.geteuid(), os.getegid())
    if asked not in (None, own):
        raise CniError(
            NOT_PERMITTED, f"--user {asked}: only root becomes another user, this is {own}; leave it out"
        )
    return own


def _broker(options: argparse.Namespace, env: Mapping[str, str]) -> str | None:
    """The socket to ask; None where the attachments are to be opened here."""
    if options.netns:
        return None
    usual = env.get("VMTAP_BROKER") or f"{_state(env)}/launcher/broker.sock"
    path: str | None = options.broker or (usual if os.path.exists(usual) else None)
    if options.shared and path is None:
        raise CniError(spec.INVALID_ENVIRONMENT, f"--shared is for the node agent, and {usual} is not there")
    return path


def _from_broker(path: str, options: argparse.Namespace) -> tuple[Attachments, Take]:
    from cni.launcher import broker_client  # noqa: PLC0415 - socket and json are of no use to the others

    given = broker_client.ask(
        path,
        ifnames=options.ifname,
        queues=options.queues,
        shared=options.shared,
        open=not options.print,
    )
    fds = {attachment.ifname: opened for attachment, opened in given}
    return [(attachment, options.queues or attachment.queues) for attachment, _ in given], fds.__getitem__


def _local(options: argparse.Namespace, env: Mapping[str, str]) -> tuple[Attachments, Take]:
    pod = (
        netns.open_path(options.netns, name="--netns", own_allowed=True)
        if options.netns
        else os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    )
    there = in_netns(_state(env), netns.identity(pod))
    records = select(there, options.ifname, options.netns or "this network namespace")
    tuned = [tapdev.tuned(pod, record) for record in records]
    queues = {record.ifname: (record, queue_count(record, options.queues)) for record in tuned}
    return list(queues.values()), lambda ifname: tapdev.open_queues(pod, *queues[ifname])


def _state(env: Mapping[str, str]) -> str:
    return env.get("VMTAP_STATE") or "/run/vmtap"


def _supervise(
    become_qemu: Callable[[], NoReturn], fds: Sequence[int], user: User, deadline: float | None
) -> int:
    from cni.launcher import supervise  # noqa: PLC0415 - socket and select are of no use to the others

    ours, qemus = supervise.monitor()
    [ours] = privilege.place([*fds, qemus], [ours])
    privilege.drop(user)
    status, at_once = supervise.run(
        become_qemu,
        ours,
        close=range(qemu.FIRST_FD, ours),
        deadline=DEADLINE if deadline is None else deadline,
    )
    if at_once and status not in (0, EXIT[QEMU_NOT_EXECUTABLE]):
        _fail(
            f"QEMU ended at once with status {status}; what it said is above, --print shows its command",
            0,
        )
    return status


def _fill_stdio() -> None:
    """A closed stdin, stdout or stderr becomes /dev/null, so that none of our fds gets its number."""
    while (fd := os.open("/dev/null", os.O_RDWR)) < qemu.FIRST_FD:
        os.set_inheritable(fd, True)
    os.close(fd)


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
