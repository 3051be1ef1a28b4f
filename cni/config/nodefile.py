"""Files that a node's administrator writes, in YAML. A file that others could have written is refused.

Fails closed: YAML that two readers could understand differently is refused, too. Must not know what a file is about.
"""

from __future__ import annotations

import os
import stat

from cni import spec
from cni.config import foreign, schema
from cni.errors import CniError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MOST_EVENTS = 50_000
"""Of the parser, about two a value: each costs some 10 µs in all."""


def read(path: str, rules: dict[str, Any]) -> dict[str, Any] | None:
    """The document in the file; {} if it is empty, None if there is no file. rules: its JSON Schema.

    Raises CniError 7 if it is invalid, or users other than root and the caller could have written it.
    """
    text = _read(path)
    return None if text is None else parse(path, text, rules)


def parse(path: str, text: bytes, rules: dict[str, Any]) -> dict[str, Any]:
    """The document in the text. path: what errors name. rules: its JSON Schema. Raises CniError 7 if it is invalid."""
    document = _decode(path, text)
    document = {} if document is None else document
    try:
        if not schema.accepts(rules, document):
            document = schema.given(rules, document, zero=False)  # capacity: 0 may have been meant as none
        if not schema.accepts(rules, document):
            schema.explain(rules, document, foreign=foreign.POLICY)
    except CniError as error:
        raise CniError(error.code, f"{path}: {error.msg}", error.details) from error
    found: dict[str, Any] = document
    return found


def _read(path: str) -> bytes | None:
    try:
        # O_NONBLOCK: opening a FIFO must not block.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        place = path
        while place and not os.path.exists(place):
            if os.path.islink(place):
                why = f"{place} is a symlink that leads nowhere"
                raise _distrusted(path, why, "remove it or repair it") from error
            place = os.path.dirname(place)
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _distrusted(path, "it is not a regular file", "put a regular file there")
        _owned(path, path, status)
        _placed(path, file)
        content = b""
        while len(content) <= MAX_BYTES and (more := os.read(file, MAX_BYTES)):
            content += more
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(file)
    if len(content) > MAX_BYTES:
        raise _distrusted(path, f"it is larger than {MAX_BYTES} bytes", "make it smaller")
    return content


def _placed(path: str, file: int) -> None:
    """Refuse a file outside its folder, or in a folder where others can remove it: no file means no restriction."""
    folder = os.path.realpath(os.path.dirname(path) or ".")
    # Where the open file is: the symlinks of a ConfigMap's path may be exchanged at any moment.
    place = os.path.dirname(os.readlink(f"/proc/self/fd/{file}"))
    if os.path.commonpath((folder, place)) != folder:
        raise _distrusted(path, "it is a symlink out of its folder", "put the file itself there")
    for parent in dict.fromkeys((folder, place)):
        # Nobody can write to a read-only mount, whatever its mode: a pod's ConfigMap is one, of mode 0777. In a folder
        # with the sticky bit nobody can remove or rename another user's file.
        if not os.statvfs(parent).f_flag & os.ST_RDONLY:
            status = os.stat(parent)
            _owned(path, parent, status, sticky=bool(status.st_mode & stat.S_ISVTX))


def _owned(path: str, place: str, status: os.stat_result, *, sticky: bool = False) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise _distrusted(path, f"{place} belongs to user {status.st_uid}", f"chown root {place}")
    if status.st_mode & 0o022 and not sticky:
        raise _distrusted(path, f"others may write to {place}", f"chmod go-w {place}")


def _distrusted(path: str, why: str, remedy: str) -> CniError:
    return CniError(spec.INVALID_NETWORK_CONFIG, f"the file {path} is refused: {why}; {remedy}")


def _unreadable(path: str, error: OSError) -> CniError:
    return _distrusted(path, f"it cannot be read ({error.strerror})", "make it a readable file")


def _decode(path: str, content: bytes) -> Any:
    found = documents(path, content)
    if len(found) > 1:
        raise CniError(spec.INVALID_NETWORK_CONFIG, f"{path}: it has {len(found)} documents; give one")
    return found[0] if found else None


def documents(path: str, content: bytes, *, depth: int = MAX_DEPTH, events: int = MOST_EVENTS) -> list[Any]:
    """The documents of YAML without aliases, tags, repeated keys and keys that are not strings.

    path: what errors name. depth, events: the most levels, and events of the parser. Raises CniError 7.
    """
    import yaml  # noqa: PLC0415 - 30 ms, and a host without such a file does not need it

    loader: type[yaml.SafeLoader | yaml.CSafeLoader]
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        text = content.decode()
        level = 0
        for count, event in enumerate(yaml.parse(text, loader)):
            if count > events:
                raise _FaultError("the file has too many values; make it smaller", event.start_mark)
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > depth:
                raise _FaultError(f"nested deeper than {depth} levels", event.start_mark)
            if isinstance(event, yaml.AliasEvent):
                raise _FaultError(f"the alias *{event.anchor} is not allowed; write it out", event.start_mark)
            if tag := getattr(event, "tag", None):
                raise _FaultError(f"the tag {tag} is not allowed; leave it out", event.start_mark)
        parser = loader(text)
        try:
            found = []
            while parser.check_node() and (node := parser.get_node()):
                _inspect(node)
                found.append(parser.construct_document(node))
            return found
        finally:
            parser.dispose()
    except _FaultError as fault:
        why, mark = fault.args
    except yaml.MarkedYAMLError as error:
        why, mark = error.problem, error.problem_mark
    except (ValueError, yaml.YAMLError) as error:
        why, mark = reason(error).partition("\n")[0], None
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    raise CniError(spec.INVALID_NETWORK_CONFIG, f"{path}{where}: {why}")


class _FaultError(Exception):
    """(reason, yaml.Mark)"""


def _inspect(node: yaml.Node) -> None:
    import yaml  # noqa: PLC0415

    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str" or not isinstance(key, yaml.ScalarNode):
                raise _FaultError("a key must be a plain string", key.start_mark)
            if key.value in seen:
                raise _FaultError(f"the key {schema.show(key.value)} stands twice", key.start_mark)
            seen.add(key.value)
            _inspect(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _inspect(value)
