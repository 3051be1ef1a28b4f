"""The command vmtap-launch: arguments, the order of a start, errors as one line and an exit code.

    options → root or broker → QEMU's path → attachments → queues, vhost, seed → drop privileges → exec, or fork and
    supervise

The queues come from the node agent if its socket exists (broker_client.py); else the launcher opens them itself.

docs/launcher.md has the exit codes. Imports at the top what every start needs, the rest where it is used.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from mmap import ACCESS_READ, mmap

from cni import spec
from cni.errors import CniError, reason
from cni.kernel import netns, tapdev
from cni.launcher import NO_VHOST, NOT_PERMITTED, QEMU_NOT_EXECUTABLE, QEMU_NOT_FOUND, privilege, qemu
from cni.launcher.privilege import User
from cni.names import escaped
from cni.state import folder
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
"""KubeVirt's user for QEMU."""
VHOST = "/dev/vhost-net"
DEADLINE = 30.0
"""Default of --deadline, in seconds."""

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
"""CNI or launcher error code → exit code: of sysexits.h, or a shell's 126 and 127. Any other error is EX_SOFTWARE."""

PACKAGES = {
    "x86_64": "qemu-system-x86",
    "i386": "qemu-system-x86",
    "aarch64": "qemu-system-arm",
    "arm": "qemu-system-arm",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code. Does not return if the process becomes QEMU, which it does without --supervise."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback at Ctrl-C
    try:
        return launch(sys.argv[1:] if argv is None else argv, os.environ)
    except CniError as error:
        return _fail(str(error), EXIT.get(error.code, os.EX_SOFTWARE))
    except OSError as error:
        return _fail(f"a system call failed: {reason(error)}", os.EX_OSERR)
    except Exception as error:  # a user gets one line and an exit code, never a traceback
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?"
        return _fail(f"internal error, please report it: {error!r} at {where}", os.EX_SOFTWARE)


def launch(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Start QEMU. Returns only with --print or --supervise. Raises CniError."""
    options, qemu_argv = parse(argv)
    user, broker = _user(options.user), _broker(options, env)
    if os.geteuid() != 0 and broker is None:
        raise CniError(
            NOT_PERMITTED,
            f"must start as root, not as uid {os.geteuid()}, or with the node agent's socket: is it mounted here?",
        )
    path = find(qemu_argv[0], env)
    _fill_stdio()
    attachments, take = _from_broker(broker, options) if broker else _local(options, env)
    vhost = vhost_wanted(options.vhost)
    command = qemu.command(
        qemu_argv,
        attachments,
        vhost=vhost,
        seeded=options.seed,
        supervised=options.supervise,
        sandboxed=has_sandbox(path),
    )
    if options.print:
        print(shlex.join(command))
        return os.EX_OK

    fds = []
    for record, queues in attachments:
        fds += take(record.ifname)
        fds += [os.open(VHOST, os.O_RDWR | os.O_CLOEXEC) for _ in range(queues if vhost else 0)]
    if options.seed:
        from cni.launcher import seed  # noqa: PLC0415 - pycdlib is slow to import

        fds.append(seed.make([record for record, _ in attachments]))

    def become_qemu() -> NoReturn:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execve(path, command, privilege.environment(env))  # noqa: S606
        except OSError as error:
            raise CniError(QEMU_NOT_EXECUTABLE, f"{path} cannot be run as {user}", reason(error)) from error

    if options.supervise:
        return _supervise(become_qemu, fds, user, options.deadline)
    privilege.place(fds)
    privilege.drop(user)
    return become_qemu()


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the QEMU command that the user gave after "--". Raises CniError; --help exits."""
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options = _parser().parse_args(argv[:split])
    qemu_argv = argv[split + 1 :]
    wrong = None
    if not qemu_argv:
        wrong = f"the QEMU command is missing; end with: -- qemu-system-{os.uname().machine} ARGS"
    elif len(set(options.ifname)) < len(options.ifname):
        wrong = "--ifname names one attachment twice"
    elif options.deadline is not None and not options.supervise:
        wrong = "--deadline needs --supervise: without it the launcher becomes QEMU"
    elif options.supervise and {"-daemonize", "--daemonize"} & set(qemu_argv):
        wrong = "-daemonize detaches QEMU from --supervise; leave one of them out"
    elif options.netns and (options.broker or options.shared):
        wrong = "--broker and --shared apply to the launcher's own namespace; leave --netns out"
    if wrong:
        raise CniError(spec.INVALID_ENVIRONMENT, wrong)
    return options, qemu_argv


def select(records: Sequence[Record], ifnames: Sequence[str], where: str) -> list[Record]:
    """The records of ifnames, in that order; all records if ifnames is empty. Raises CniError NO_ATTACHMENT."""
    if not records:
        raise CniError(
            spec.NO_ATTACHMENT,
            f"no attachment in {where}: add one by a runtime or cnitool, or give another --netns",
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
    """The number of queues to open: wanted, or all that ADD configured. Raises CniError if wanted is more."""
    if wanted is not None and wanted > record.queues:
        raise CniError(
            spec.INVALID_ENVIRONMENT,
            f'--queues {wanted}: {record.ifname} has {record.queues}, by "queues" of its network config',
        )
    return wanted or record.queues


def vhost_wanted(choice: str, device: str = VHOST) -> bool:
    """Whether to use vhost. choice: on, off or auto (if device can be opened). Raises CniError NO_VHOST."""
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
            reason(error),
        ) from None
    return True


def find(program: str, env: Mapping[str, str]) -> str:
    """The path of the program, searched in PATH as a shell does. Raises CniError."""
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


def has_sandbox(path: str) -> bool:
    """Whether the QEMU at path has -sandbox: it is linked with libseccomp then. To ask it would take 50 ms."""
    try:
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
            return text.find(b"libseccomp.so") >= 0
    except (OSError, ValueError):  # it cannot be read, or is empty
        return False


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [options] -- qemu-system-… ARGS",
        description="Starts QEMU with the open fds of a network namespace's attachments and without privileges.",
        epilog="Exit codes and examples: docs/launcher.md",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100),  # else it imports shutil
    )
    add = parser.add_argument
    add("--netns", metavar="PATH", help="the pod's network namespace; default: the launcher's own")
    add(
        "--broker",
        metavar="PATH",
        help="the node agent's socket; default: $VMTAP_BROKER or /run/vmtap/launcher/broker.sock, if it exists",
    )
    add(
        "--shared", action="store_true", help="take the queues even if another launcher of the pod holds some"
    )
    add("--ifname", metavar="NAME", action="append", default=[], help="only this attachment; may be repeated")
    add(
        "--user",
        metavar="USER[:GROUP]",
        type=privilege.parse_user,
        help=f"QEMU's user, if started as root; default: {DEFAULT_USER}",
    )
    add(
        "--queues",
        metavar="N",
        type=_whole,
        help="open N queues of each attachment; default: all",
    )
    add(
        "--vhost",
        choices=("on", "off", "auto"),
        default="auto",
        help="default: auto, which is on if the host has it",
    )
    add("--seed", action="store_true", help="give the guest its addresses as a NoCloud seed (cloud-init)")
    add("--supervise", action="store_true", help="stay as QEMU's parent, and turn signals into a power-down")
    add(
        "--deadline", metavar="SECONDS", type=_seconds, help=f"from power-down to quit; default: {DEADLINE:g}"
    )
    add("--print", action="store_true", help="print the QEMU command, and open nothing")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CniError(spec.INVALID_ENVIRONMENT, f"{message}; see {PROGRAM} --help")


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to 86400 seconds")
    return seconds


def _user(wanted: User | None) -> User:
    """The user to run QEMU as. Raises CniError NOT_PERMITTED if a user other than root wants another one."""
    if os.geteuid() == 0:
        return wanted or DEFAULT_USER
    own = User(os.geteuid(), os.getegid())
    if wanted not in (None, own):
        raise CniError(
            NOT_PERMITTED, f"--user {wanted}: only root can become another user, this is {own}; leave it out"
        )
    return own


def _broker(options: argparse.Namespace, env: Mapping[str, str]) -> str | None:
    """The path of the broker's socket; None if the launcher is to open the queues itself."""
    if options.netns:
        return None
    default = env.get("VMTAP_BROKER") or f"{_state(env)}/launcher/broker.sock"
    path: str | None = options.broker or (default if os.path.exists(default) else None)
    if options.shared and path is None:
        raise CniError(
            spec.INVALID_ENVIRONMENT, f"--shared needs the node agent, and {default} does not exist"
        )
    return path


def _from_broker(path: str, options: argparse.Namespace) -> tuple[Attachments, Take]:
    """Attachments with their number of queues, and a function ifname → fds: of the broker. Raises CniError."""
    from cni.launcher import broker_client  # noqa: PLC0415 - socket and json are slow to import

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
    """Attachments with their number of queues, and a function ifname → fds: from records. Raises CniError.

    A record whose link is gone is chosen only by its name in --ifname, or if no record has a link: it may be of a dead
    namespace whose inode number this one has, or of an attachment that was removed without this state folder.
    """
    pod = (
        netns.open_path(options.netns, name="--netns", own_allowed=True)
        if options.netns
        else os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    )
    recorded = in_netns(_state(env), netns.identity(pod))
    there = {record.ifname: tuned for record in recorded if (tuned := tapdev.tuned(pod, record))}
    recorded = [there.get(record.ifname, record) for record in recorded]
    if there and not options.ifname:
        recorded = list(there.values())
    records = select(recorded, options.ifname, options.netns or "this network namespace")
    queues = {record.ifname: (record, queue_count(record, options.queues)) for record in records}
    return list(queues.values()), lambda ifname: tapdev.open_queues(pod, *queues[ifname])


def _state(env: Mapping[str, str]) -> str:
    return folder.named(env) or folder.DEFAULT


def _supervise(
    become_qemu: Callable[[], NoReturn], fds: Sequence[int], user: User, deadline: float | None
) -> int:
    from cni.launcher import supervise  # noqa: PLC0415 - socket and select are slow to import

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
            f"QEMU ended at once with status {status}; its messages are above, --print shows its command",
            0,
        )
    return status


def _fill_stdio() -> None:
    """Open /dev/null as each of stdin, stdout and stderr that is closed, so that no other fd gets its number."""
    while (fd := os.open("/dev/null", os.O_RDWR)) < qemu.FIRST_FD:
        os.set_inheritable(fd, True)
    os.close(fd)


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {escaped(' '.join(message.split()))}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
