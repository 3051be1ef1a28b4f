"""The environment of a request, CNI_ARGS above all: netconf.arguments, mac.derive, and plugin.handle of the rest."""

from __future__ import annotations

import json
import tempfile

from cni import plugin
from cni.attach.call import Node, Request
from cni.config import mac, netconf
from cni.errors import CniError
from cni.spec import INVALID_ENVIRONMENT
from cni.state.store import Store
from lab.fuzz import claims
from lab.fuzz.targets import Target

_STDIN = json.dumps({"cniVersion": "1.1.0", "name": "n", "type": "vmtap", "device": "tap"}).encode()


def run(data: bytes) -> None:
    """data: the entries of an environment, each ended by a NUL. CNI_NETNS leads nowhere, so nothing is attached."""
    env: dict[str, str] = {}
    for entry in data.decode(errors="surrogateescape").split("\0"):
        name, _, value = entry.partition("=")
        env.setdefault(name, value)
    _arguments(env)
    if env.get("CNI_COMMAND") in ("DEL", "GC"):  # these would look for links on this machine
        env["CNI_COMMAND"] = "ADD"
    env["CNI_NETNS"] = "/nonexistent"
    node = Node(Store(f"{tempfile.gettempdir()}/state"), policy=lambda: None)
    response = plugin.handle(Request(env, _STDIN), node)
    assert response.stdout.count(b"\n") <= 1
    if response.error:
        claims.refused(response.error)
    elif response.stdout:
        json.loads(response.stdout)


def _arguments(env: dict[str, str]) -> None:
    text = env.get("CNI_ARGS", "")
    lenient = netconf.arguments(text, command="DEL")
    try:
        strict = netconf.arguments(text)
        conf = netconf.with_arguments(netconf.parse(_STDIN), strict)
    except CniError as error:
        claims.refused(error, (INVALID_ENVIRONMENT,))
    else:
        assert strict == lenient, "DEL reads other arguments than ADD did"
        if conf.mac:
            claims.unicast(conf.mac)
    claims.unicast(
        mac.derive(mac.PLAIN, "n", env.get("CNI_CONTAINERID", ""), env.get("CNI_IFNAME", ""), lenient)
    )


_WORDS = (
    *("CNI_COMMAND=", "CNI_CONTAINERID=", "CNI_IFNAME=", "CNI_ARGS=", "CNI_PATH=", "\0", ";"),
    *("ADD", "CHECK", "STATUS", "VERSION", *(f"{name}=" for name in netconf.KNOWN_ARGS)),
    *("IgnoreUnknown=1", "MAC=02:00:00:00:00:01", "virt-launcher-vm-abcde"),
)
TARGET = Target(run, words=_WORDS)
