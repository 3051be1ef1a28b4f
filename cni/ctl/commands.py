"""What each command of vmtapctl does: it looks, prints, and returns the exit status.

docs/vmtapctl.md has the exit statuses and the JSON. Loaded once the arguments are known to be right.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress

from argcomplete.shell_integration import shellcode

from cni import spec
from cni.ctl import (
    capture,
    doctor,
    installation,
    lint,
    lldp,
    locations,
    picture,
    probe,
    render,
    snapshot,
    watch,
)
from cni.ctl.trace import gather, text
from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable
    from typing import Any

    from cni.ctl.inventory import Attachment
    from cni.ctl.locations import Settings

PROGRAM = "vmtapctl"
INVALID = 2
"""A file that lint checked is invalid."""
REFLECTS = {True: 0, False: 1, None: 2}
TALK = {"can": 0, "may": 2, "cannot": 1}
"""The verdict of several pairs is the first of these that one of them has."""


def _list(options: argparse.Namespace) -> int:
    node = snapshot.take(_settings(options))
    if options.json:
        return _json({key: node.document()[key] for key in ("node", "time", "attachments", "unreadable")})
    render.say(render.attachments(node.attachments, render.console(), wide=options.wide))
    if node.unreadable:
        print(
            f"{PROGRAM}: records cannot be read: {', '.join(node.unreadable)}; run vmtapctl doctor",
            file=sys.stderr,
        )
    return 0


def _show(options: argparse.Namespace) -> int:
    found = _named(options)
    if options.json:
        return _json({"attachments": [each.document() for each in found]})
    for number, each in enumerate(found):
        if number:
            print()
        render.say(render.details(each))
    return 0


def _tree(options: argparse.Namespace) -> int:
    found = _settings(options)
    neighbours = lldp.known()
    if options.lldp:
        nics = {nic for source in snapshot.take(found).sources for nic in source.nics} - neighbours.keys()
        neighbours |= lldp.listen(sorted(nics), options.lldp)
    node = snapshot.take(found, neighbours)
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
    return watch.run(_settings(options), as_json=options.json)


def _capture(options: argparse.Namespace) -> int:
    if options.size and not options.write:
        raise CniError(
            spec.INVALID_ENVIRONMENT, "--size limits what --write writes: give --write, or --count"
        )
    found = [each for each in _named(options) if each.link]
    if not found:
        raise CniError(spec.NO_ATTACHMENT, f"{options.what!r}: its link is gone")
    if len(found) > 1:
        several = ", ".join(f"{each.record.mac} ({each.record.ifname} of {each.sandbox})" for each in found)
        raise CniError(
            spec.INVALID_ENVIRONMENT,
            f"{options.what!r} has {len(found)} attachments: name one by its MAC: {several}",
        )
    wanted = capture.Wanted(
        filter=" ".join(options.filter),
        write=options.write,
        snap=options.snap,
        count=options.count,
        seconds=options.seconds,
        size=options.size,
        direction=options.direction,
    )
    summary = capture.run(found[0], wanted, as_json=options.json)
    with suppress(BrokenPipeError):
        for line in [json.dumps(summary.document())] if options.json else summary.lines():
            print(line, file=sys.stderr, flush=True)
    return summary.status


def _doctor(options: argparse.Namespace) -> int:
    found = doctor.examine(_settings(options, complain=False))
    count = {severity: sum(each.severity == severity for each in found) for severity in render.SEVERITY}
    status = int(bool(count["error"] or (options.strict and count["warning"])))
    if options.json:
        _json({"findings": [each.document() for each in found], **count})
        return status
    render.say(render.findings(found, terminal=render.console().is_terminal))
    print(
        f"\n{render.count(count['error'], 'error')}, {render.count(count['warning'], 'warning')}, {count['ok']} ok"
    )
    return status


def _probe(options: argparse.Namespace) -> int:
    found = probe.run(options.source, _settings(options).run, options.lldp)
    if options.json:
        _json(found.document())
    else:
        render.say(render.probe(found))
    return REFLECTS[found.found.reflects]


def _trace(options: argparse.Namespace) -> int:
    found = gather.trace(_settings(options), *options.ends)
    best = min((each.verdict for each in found), key=list(TALK).index)
    if options.json:
        _json({"verdict": best, "pairs": [each.document() for each in found]})
    else:
        render.say(text.shown(found))
    return TALK[best]


def _lint(options: argparse.Namespace) -> int:
    rules = lint.read_policy(options.policy) if options.policy else None
    found = [lint.check(path, rules) for path in options.files]
    if options.json:
        _json({"files": [each.document() for each in found]})
    else:
        for each in found:
            for fault in each.faults:
                print(f"{each.file}: {fault}")
            if not each.faults:
                print(f"{each.file}: valid {each.kind}")
    return INVALID if any(each.faults for each in found) else 0


def _install(options: argparse.Namespace) -> int:
    return _done(installation.install(options.bin_dir, options.names), as_json=options.json)


def _uninstall(options: argparse.Namespace) -> int:
    found = _settings(options)
    steps = installation.uninstall(
        options.bin_dir, found.run, found.cdi, found.kubelet, state=options.state, force=options.force
    )
    return _done(steps, as_json=options.json)


def _done(steps: Iterable[str], *, as_json: bool) -> int:
    """Print each step when it is done, as a later one may fail."""
    done = []
    for step in steps:
        done.append(step)
        if not as_json:
            print(step, flush=True)
    return _json({"done": done}) if as_json else 0


def _completion(options: argparse.Namespace) -> int:
    print(shellcode([PROGRAM], shell=options.shell))
    return 0


def _named(options: argparse.Namespace) -> list[Attachment]:
    """The attachments that options.what names. Raises CniError NO_ATTACHMENT if there is none."""
    node = snapshot.take(_settings(options))
    found = node.find(options.what)
    if not found:
        known = sorted({each.sandbox for each in node.attachments})
        there = f"attached are {', '.join(known)}" if known else "nothing is attached on this node"
        raise CniError(spec.NO_ATTACHMENT, f"no attachment is named or belongs to {options.what!r}; {there}")
    return found


def _settings(options: argparse.Namespace, *, complain: bool = True) -> Settings:
    found = locations.load(run=options.run, policy=options.policy, file=options.config)
    if found.fault and complain:
        print(f"{PROGRAM}: {found.fault}; the defaults are used", file=sys.stderr)
    return found


def _json(document: dict[str, Any]) -> int:
    print(json.dumps(document, indent=2, ensure_ascii=False))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "show": _show,
    "tree": _tree,
    "watch": _watch,
    "capture": _capture,
    "doctor": _doctor,
    "probe": _probe,
    "trace": _trace,
    "lint": _lint,
    "install": _install,
    "uninstall": _uninstall,
    "completion": _completion,
}
"""Raises CniError, OSError. The arguments are those of __main__.make_parser()."""
