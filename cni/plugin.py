"""Request → Response: the version gate, validation, dispatch.

handle() reads no environment, prints nothing, exits nothing, keeps nothing, and leaves the calling thread's network
namespace as it was. So the one-shot executable and the threaded agent share it.
"""

from __future__ import annotations

import errno
import json
import os

from cni.attach import result
from cni.attach.add import add
from cni.attach.call import Call, Node, Request
from cni.attach.check import check
from cni.attach.delete import delete
from cni.attach.gc import collect
from cni.attach.ipam import DELEGATED
from cni.attach.status import status
from cni.config import netconf
from cni.config import policy as policies
from cni.dataclass import dataclass
from cni.errors import CniError, refused
from cni.kernel import netns
from cni.kernel.rtnl import Host
from cni.names import IFNAME_BYTES, is_id, is_ifname, printable
from cni.spec import (
    INCOMPATIBLE_VERSION,
    INTERNAL,
    INVALID_ENVIRONMENT,
    INVALID_NETWORK_CONFIG,
    PLUGIN_NOT_AVAILABLE,
    VERSIONS,
)
from cni.state.lock import keep_turn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


_SMALL = 1 << 14
"""Bytes of a config that is validated, or refused, within a millisecond."""
_ATTACHMENT = ("CNI_CONTAINERID", "CNI_IFNAME")
_REQUIRED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": _ATTACHMENT,
    "GC": ("CNI_PATH",),
    "STATUS": (),
    "VERSION": (),
}
_SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
_JSON = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one each time


@dataclass(frozen=True)
class Response:
    """What to print on stdout (one JSON document or nothing), what to exit with, and the error if there was one."""

    stdout: bytes
    status: int
    error: CniError | None = None


def handle(
    request: Request, node: Node, host: Host | None = None, yield_turn: Callable[[], None] = keep_turn
) -> Response:
    """Carry out one request. Never raises Exception.

    host: a socket of the calling thread's network namespace, where the caller keeps one; yield_turn: called before a
    wait that other requests need not share.
    """
    config = netconf.Document(request.stdin, request.env.get("CNI_COMMAND", ""))
    if len(request.stdin) > _SMALL:
        yield_turn()  # decoding it may take some milliseconds
    try:
        answer = _dispatch(request, config, node, host, yield_turn)
    except CniError as error:
        return refuse(config, error)
    except OSError as error:
        what = "the kernel refused a step of it"
        if error.filename and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            what = f"{error.filename} cannot be written: is its file system full or read-only?"
        return refuse(config, refused(error, what))
    except Exception as error:  # a runtime must get JSON, whatever the fault
        details = f"{type(error).__name__}: {error}"
        return refuse(config, CniError(INTERNAL, "a fault in vmtap itself: please report it", details))
    return Response(b"" if answer is None else _encode(answer), 0)


def refuse(config: netconf.Document, error: CniError) -> Response:
    """The error as SPEC section 5 has it, in the version of the config if that is known here."""
    version = config.version
    document = {
        "cniVersion": version if version in VERSIONS else VERSIONS[-1],
        "code": error.code,
        "msg": error.msg,
    }
    if error.details:
        document["details"] = error.details
    # Else the frames in them and the response keep each other, and the request, until a garbage collection.
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return Response(_encode(document), 1, error)


def _dispatch(
    request: Request,
    config: netconf.Document,
    node: Node,
    host: Host | None,
    yield_turn: Callable[[], None],
) -> dict[str, Any] | None:
    command = request.env.get("CNI_COMMAND", "")
    if command not in _REQUIRED:
        known = ", ".join(_REQUIRED)
        raise CniError(INVALID_ENVIRONMENT, f"CNI_COMMAND {command!r} is none of {known}")
    if command == "VERSION":
        version = config.version or VERSIONS[-1]
        return {"cniVersion": version, "supportedVersions": list(VERSIONS)}
    if DELEGATED in request.env:
        if command in ("DEL", "GC"):
            return None  # nothing of it has been added, and the pod must be deleted
        raise CniError(
            INVALID_NETWORK_CONFIG,
            "ipam.type is vmtap itself, under another name; give an IPAM plugin, such as host-local",
        )
    _check_required(command, request.env)
    try:
        _check_environment(command, request.env)
    except CniError:
        if command != "DEL":
            raise
        return None  # no ADD has accepted the names, which a pod's author may have chosen
    conf = netconf.read(config, request.called_as)
    arguments = netconf.arguments(request.env.get("CNI_ARGS", ""), command=command)
    conf = netconf.with_arguments(conf, arguments)
    since = _SINCE.get(command, VERSIONS[0])
    if VERSIONS.index(conf.cni_version) < VERSIONS.index(since):
        raise CniError(
            INCOMPATIBLE_VERSION, f"cniVersion {conf.cni_version} has no {command}: it came with {since}"
        )
    own = host or Host()
    opened = None
    try:
        opened = _open(request, command, own)
        return _carry_out(command, Call(request, node, conf, arguments, own, opened, yield_turn))
    finally:
        if opened not in (None, request.netns):
            os.close(opened)
        if own is not host:
            own.close()


def _carry_out(command: str, call: Call) -> dict[str, Any] | None:
    conf = call.conf
    match command:
        case "ADD":
            result.require_address(conf)
            return add(call, policies.authorize(call.node.policy(), conf))
        case "DEL":
            delete(call)
        case "CHECK":
            check(call, policies.authorize(call.node.policy(), conf, delegate=False))
        case "GC":
            collect(call)
        case "STATUS":
            try:
                policy = call.node.policy()
                # STATUS comes before there is a pod, and so without the device that the kubelet allocates for it.
                grant = None if policies.left_to_kubelet(conf) else policies.authorize(policy, conf)
            except CniError as error:
                raise CniError(PLUGIN_NOT_AVAILABLE, error.msg, error.details) from error
            status(call, grant)
    return None


def _check_required(command: str, env: Mapping[str, str]) -> None:
    """Check SPEC section 2 "Parameters". Raises CniError 4 that lists everything that is missing."""
    missing = [name for name in _REQUIRED[command] if not env.get(name)]
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"{command} needs {', '.join(missing)} in the environment")


def _check_environment(command: str, env: Mapping[str, str]) -> None:
    """Check the values of the variables that the command needs. Raises CniError 4."""
    if "CNI_CONTAINERID" in _REQUIRED[command]:
        container_id, ifname = env["CNI_CONTAINERID"], env["CNI_IFNAME"]
        if not is_id(container_id):
            raise CniError(
                INVALID_ENVIRONMENT,
                f"CNI_CONTAINERID {container_id!r} must begin with a letter or digit and go on with those, _, . or -",
            )
        if not is_ifname(ifname):
            raise CniError(
                INVALID_ENVIRONMENT,
                f"CNI_IFNAME {ifname!r} must be 1 to {IFNAME_BYTES} bytes of printable UTF-8, with no '/', ':', '%' "
                "or white space",
            )
    if "CNI_NETNS" in _REQUIRED[command] and not printable(env["CNI_NETNS"]):
        raise CniError(
            INVALID_ENVIRONMENT,
            f"CNI_NETNS {env['CNI_NETNS']!r} is not allowed; give a path in printable UTF-8",
        )


def _open(request: Request, command: str, host: Host) -> int | None:
    """An fd of CNI_NETNS: the request's, or a new one. None for DEL if it cannot be opened, as its pod may be gone."""
    path = request.env.get("CNI_NETNS", "")
    if command in ("GC", "STATUS") or not path:
        return None
    try:
        if request.netns is None:
            return netns.open_path(path, own=host.identity)
        return netns.reopen(request.netns, path, own=host.identity)
    except CniError:
        if command != "DEL":
            raise
        return None


def _encode(document: dict[str, Any]) -> bytes:
    return _JSON.encode(document).encode() + b"\n"
