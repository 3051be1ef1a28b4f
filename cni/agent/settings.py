"""The agent's settings, from a file and from flags, which override it. cni/config/schema/agent.json defines both."""

from __future__ import annotations

import json

from cni.config import nodefile, schema
from cni.dataclass import dataclass
from cni.errors import CniError
from cni.spec import INVALID_NETWORK_CONFIG

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

DEFAULT_FILE = "/etc/vmtap/agent.yaml"


@dataclass(frozen=True)
class Settings:
    """The fields of cni/config/schema/agent.json."""

    run: str
    policy: str
    delegate_seconds: int
    drain_seconds: int
    reconcile_seconds: int
    metrics: str
    attachment_metrics: bool
    health: str
    device_plugin: bool
    resource_namespace: str
    kubelet: str
    pod_resources: str
    device_route: str
    cdi: str
    dra: bool
    node: str
    hook: str
    broker_mount: bool
    nri: str
    cgroup: str
    log_level: str


def load(argv: Sequence[str]) -> Settings:
    """Read the settings from the file and the flags. Raises CniError 7 that names the field; --help exits."""
    rules = schema.load("agent")
    flags = _plain(rules["properties"], argv) or _explained(rules["properties"], argv)
    file = flags.pop("config")
    document = nodefile.read(file or DEFAULT_FILE, rules)
    if document is None and file:
        raise CniError(INVALID_NETWORK_CONFIG, f"--config {file}: no such file")
    if not schema.accepts(rules, flags):
        schema.explain(rules, flags)
    fields: dict[str, Any] = schema.defaults(rules) | (document or {}) | flags
    return Settings(**{_snake(name): value for name, value in fields.items()})


def _plain(properties: dict[str, Any], argv: Sequence[str]) -> dict[str, Any] | None:
    """The flags by field; None for --help and for what argparse would refuse: it is a megabyte of an agent's memory."""
    kinds = {_flag(name): (name, rule["type"]) for name, rule in properties.items()}
    kinds["--config"] = ("config", "string")
    flags: dict[str, Any] = {"config": None}
    words = iter(argv)
    for word in words:
        flag, given, text = word.partition("=")
        positive = flag.replace("--no-", "--", 1)
        name, kind = kinds.get(positive, ("", ""))
        if kind == "boolean" and not given:
            flags[name] = flag == positive
            continue
        text = text if given else next(words, "-")
        if flag != positive or kind not in ("string", "integer") or (not given and text.startswith("-")):
            return None
        if text == "--":  # argparse leaves it out (argparse.py, _get_values)
            return None
        try:
            flags[name] = text if kind == "string" else int(text)
        except ValueError:
            return None
    return flags


def _explained(properties: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """_plain() by argparse, which answers --help, names a mistake, and exits."""
    import argparse  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="vmtapd",
        description="The node agent of vmtap. Every flag is a field of the file, too.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", default=None, help=f"default: {DEFAULT_FILE}, if it is there"
    )
    for name, rule in properties.items():
        text = f"{rule['description']} Default: {json.dumps(rule['default'])}".replace("%", "%%")
        if rule["type"] == "boolean":
            parser.add_argument(_flag(name), dest=name, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = int if rule["type"] == "integer" else str
            parser.add_argument(_flag(name), dest=name, metavar=kind.__name__.upper(), type=kind, help=text)
    return vars(parser.parse_args(argv))


def _flag(name: str) -> str:
    return "--" + _snake(name).replace("_", "-")


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
