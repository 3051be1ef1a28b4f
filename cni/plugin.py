"""Request → Response: the version gate, validation, dispatch.

One request is one pure call: it reads no environment, prints nothing, exits nothing, keeps nothing and leaves
the calling thread's namespace as it was, so that the one-shot executable and a threaded agent can share it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass

from cni.attach import attachment, check, result
from cni.config import netconf
from cni.config import policy as policies
from cni.errors import CniError, refused
from cni.kernel import netns
from cni.kernel.rtnl import Host
from cni.spec import (
    INCOMPATIBLE_VERSION,
    INTERNAL,
    INVALID_ENVIRONMENT,
    PLUGIN_NOT_AVAILABLE,
    VERSIONS,
)
from cni.state.lock import nothing
from cni.state.record import identifier
from cni.state.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from cni.config.netconf import NetConf
    from cni.state.record import Record

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
_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_NOT_IN_IFNAME = re.compile(r"[/:%\s\0\udc80-\udcff]")
"""To the kernel a name with % is a pattern to make one of; the last range is how Python shows what is not UTF-8."""
_IFNAME_BYTES = 15


@dataclass(frozen=True)
class Request:
    """One execution of the plugin.

    env: the whole environment (delegates get it); stdin: the network config; called_as: "vmtap" or "macvtap";
    policy: path of the node's policy file; netns: an fd of CNI_NETNS (O_PATH will do), where the caller has
    opened it; host: the calling thread's, where the caller keeps one; load_policy: see config/policy.py;
    delete_link, cdi, waits, made: see attach/attachment.py; note: see state/store.py.
    """

    env: Mapping[str, str]
    stdin: bytes
    policy: str
    state: str
    called_as: str = "vmtap"
    netns: int | None = None
    host: Host | None = None
    delegate_seconds: float = 60.0
    load_policy: Callable[[str], policies.Policy | None] = policies.load
    delete_link: attachment.DeleteLink = attachment.delete_link
    cdi: str | None = None
    waits: Callable[[], None] = nothing
    made: Callable[[Record], None] | None = None
    note: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Response:
    """What to print on stdout (one JSON document or nothing), what to exit with, and the error if there was one."""

    stdout: bytes
    status: int
    error: CniError | None = None


def handle(request: Request) -> Response:
    """Carry out one request. Never raises Exception."""
    try:
        answer = _dispatch(request)
    except CniError as error:
        return refuse(request, error)
    except OSError as error:
        return refuse(request, refused(error, "the kernel refused a step of it"))
    except Exception as error:  # the last wall: a runtime must get JSON, whatever we did wrong
        details = f"{type(error).__name__}: {error}"
        return refuse(request, CniError(INTERNAL, "a fault in vmtap itself: please report it", details))
    return Response(b"" if answer is None else _encode(answer), 0)


def refuse(request: Request, error: CniError) -> Response:
    """The error as SPEC section 5 wants it, in the version that was asked for where we know it."""
    version = netconf.peek_version(request.stdin)
    document = {
        "cniVersion": version if version in VERSIONS else VERSIONS[-1],
        "code": error.code,
        "msg": error.msg,
    }
    if error.details:
        document["details"] = error.details
    return Response(_encode(document), 1, error)


def _dispatch(request: Request) -> dict[str, Any] | None:
    command = request.env.get("CNI_COMMAND", "")
    if command not in _REQUIRED:
        known = ", ".join(_REQUIRED)
        raise CniError(INVALID_ENVIRONMENT, f"CNI_COMMAND {command!r} is none of {known}")
    if command == "VERSION":
        version = netconf.peek_version(request.stdin) or VERSIONS[-1]
        return {"cniVersion": version, "supportedVersions": list(VERSIONS)}
    _check_environment(command, request.env)
    conf = netconf.parse(request.stdin, command=command, called_as=request.called_as)
    arguments = netconf.arguments(request.env.get("CNI_ARGS", ""), command=command)
    conf = netconf.with_arguments(conf, arguments)
    since = _SINCE.get(command, VERSIONS[0])
    if VERSIONS.index(conf.cni_version) < VERSIONS.index(since):
        raise CniError(
            INCOMPATIBLE_VERSION, f"cniVersion {conf.cni_version} has no {command}: it came with {since}"
        )
    container_id, ifname = request.env.get("CNI_CONTAINERID", ""), request.env.get("CNI_IFNAME", "")
    host = request.host or Host()
    opened = None
    try:
        opened = _open(request, command, host)
        call = attachment.Call(
            conf=conf,
            host=host,
            id=identifier(conf.name, container_id, ifname),
            container_id=container_id,
            ifname=ifname,
            arguments=arguments,
            netns_path=request.env.get("CNI_NETNS", ""),
            netns=opened,
            env=request.env,
            stdin=request.stdin,
            store=Store(request.state, request.note),
            delegate_seconds=request.delegate_seconds,
            delete_link=request.delete_link,
            cdi=request.cdi,
            waits=request.waits,
            made=request.made,
        )
        return _carry_out(command, request, conf, call)
    finally:
        if opened not in (None, request.netns):
            os.close(opened)
        if host is not request.host:
            host.close()


def _carry_out(command: str, request: Request, conf: NetConf, call: attachment.Call) -> dict[str, Any] | None:
    match command:
        case "ADD":
            if conf.ipam is None and conf.prev_result is None and result.needs_ip(conf.cni_version):
                raise CniError(
                    INCOMPATIBLE_VERSION,
                    f"cniVersion {conf.cni_version} has no result without an IP address: raise it, or set ipam",
                )
            return attachment.add(call, policies.authorize(request.load_policy(request.policy), conf))
        case "DEL":
            attachment.delete(call)
        case "CHECK":
            check.check(call, policies.authorize(request.load_policy(request.policy), conf))
        case "GC":
            attachment.collect(call)
        case "STATUS":
            try:
                grant = policies.authorize(request.load_policy(request.policy), conf)
            except CniError as error:
                raise CniError(PLUGIN_NOT_AVAILABLE, error.msg, error.details) from error
            attachment.status(call, grant)
    return None


def _check_environment(command: str, env: Mapping[str, str]) -> None:
    """SPEC section 2 "Parameters". Raises CniError 4 that lists everything that is missing."""
    missing = [name for name in _REQUIRED[command] if not env.get(name)]
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"{command} needs {', '.join(missing)} in the environment")
    if "CNI_CONTAINERID" in _REQUIRED[command]:
        container_id, ifname = env["CNI_CONTAINERID"], env["CNI_IFNAME"]
        if not _CONTAINER_ID.fullmatch(container_id):
            raise CniError(
                INVALID_ENVIRONMENT,
                f"CNI_CONTAINERID {container_id!r} must begin with a letter or digit and go on with those, _, . or -",
            )
        if len(os.fsencode(ifname)) > _IFNAME_BYTES or ifname in (".", "..") or _NOT_IN_IFNAME.search(ifname):
            raise CniError(
                INVALID_ENVIRONMENT,
                f"CNI_IFNAME {ifname!r} must be 1 to {_IFNAME_BYTES} bytes, with no '/', ':', '%' or white space",
            )


def _open(request: Request, command: str, host: Host) -> int | None:
    """An fd of CNI_NETNS, that of the request or a new one. DEL goes on without: the namespace may well be gone."""
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
