"""Search for the network config that costs most: python -m tests.faults.worst [SECONDS] [time|memory].

A config is made of a few runs of one small JSON text each, under a key of the config. The search begins with texts
that are dense in values, mutates key, text, number and command, and keeps the ten that cost most. It prints each new
worst: milliseconds of CPU time, MB, command, bytes, shape.
"""
# ruff: noqa: S311 - nothing here is secret

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, replace
from typing import Any

from cni import plugin
from cni.attach import result
from cni.attach.call import Node, Request
from cni.config import netconf
from cni.errors import CniError
from cni.state.store import Store

COMMANDS = ("ADD", "STATUS", "DEL", "GC", "VERSION")
KEYS = (*netconf._rules("vmtap")["properties"], "cni.dev/x", "unknown", "k%d", "prevResult", "runtimeConfig")
TEXTS = (
    *(
        "0",
        "1.5",
        "1e9",
        "-1e-300",
        "9" * 4300,
        "0." + "9" * 5000,
        '""',
        '"%d"',
        '"\\u0001"',
        '"\\ud83d\\ude00"',
    ),
    *(
        '"é\N{GRINNING FACE}"',
        "[]",
        "{}",
        '{"":0}',
        '{"%d":{}}',
        "[" * 60 + "]" * 60,
        "null",
        "true",
        '"a b"',
    ),
    *(
        '{"address":"10.1.2.3/8"}',
        '{"address":"fd00::%d/64","gateway":"fd00::1"}',
        '{"dst":"10.0.0.0/8","gw":"10.0.0.1"}',
    ),
    *(
        '{"name":"%d","mac":"02:00:00:00:00:01"}',
        '{"containerID":"c%d","ifname":"net1"}',
        '"02:00:00:00:00:01"',
    ),
)
BASE = '"cniVersion":"1.1.0","name":"n","type":"vmtap","source":"nothing0"'
WITHIN = (
    "%s",
    "[%s]",
    '{"ips":[%s]}',
    '{"routes":[%s]}',
    '{"interfaces":[%s]}',
    '{"dns":{"search":[%s]}}',
    '{"x":[%s]}',
)


@dataclass(frozen=True)
class Run:
    """count times the text, within another, under the key."""

    key: str
    within: str
    text: str
    count: int

    def render(self, room: int) -> str:
        count = min(self.count, room // (len(self.text.encode()) + 8))
        if self.within == "%s" or "%d" in self.key:  # as many keys
            pairs = (f"{json.dumps(self.key + str(i))}:{_at(self.text, i)}" for i in range(count))
            return ",".join(pairs).replace("%d", "")
        return f"{json.dumps(self.key)}:{self.within % ','.join(_at(self.text, i) for i in range(count))}"


def _at(text: str, number: int) -> str:
    return text.replace("%d", str(number))


@dataclass(frozen=True)
class Case:
    command: str
    runs: tuple[Run, ...]

    def stdin(self) -> bytes:
        """At most 1 MiB, and less if the command allows less."""
        most = netconf.MAX_BYTES if self.command in ("DEL", "GC") else netconf.COMMAND_BYTES
        text = BASE
        for run in self.runs:
            if more := run.render((most - len(text.encode()) - 64) // len(self.runs)):
                text += f",{more}"
        return f"{{{text}}}".encode()[:most]


def carry_out(command: str, stdin: bytes, node: Node) -> None:
    """What a request costs besides the kernel: handle(), and for ADD the answer that extends prevResult."""
    env = {
        "CNI_COMMAND": command,
        "CNI_PATH": "/x",
        "CNI_CONTAINERID": "c",
        "CNI_IFNAME": "i",
        "CNI_NETNS": "/x",
    }
    response = plugin.handle(Request(env, stdin), node)
    if command == "ADD" and response.error and "CNI_NETNS" in response.error.msg:
        own = result.Result(interfaces=(result.Interface("net1"),))
        conf = netconf.parse(stdin)
        try:
            plugin._encode(result.extend(conf.prev_result, own, conf.cni_version))
        except CniError as error:
            plugin.refuse(netconf.Document(stdin), error)


def cost(case: Case, node: Node) -> tuple[float, float]:
    """(milliseconds of CPU time, the least of three; MB at the peak)"""
    stdin = case.stdin()
    times = []
    for _ in range(3):
        began = time.thread_time()
        carry_out(case.command, stdin, node)
        times.append(time.thread_time() - began)
    tracemalloc.start()
    carry_out(case.command, stdin, node)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return min(times) * 1e3, peak / 1e6


def fresh() -> Run:
    return Run(random.choice(KEYS), random.choice(WITHIN), random.choice(TEXTS), 2 ** random.randint(0, 18))


def mutated(case: Case) -> Case:
    runs = list(case.runs)
    at = random.randrange(len(runs))
    changes: dict[str, Any] = {
        "key": random.choice(KEYS),
        "within": random.choice(WITHIN),
        "text": random.choice(
            (*TEXTS, f"[{runs[at].text},{random.choice(TEXTS)}]", f'{{"a":{runs[at].text}}}')
        ),
        "count": max(1, int(runs[at].count * random.choice((0.5, 0.8, 0.95, 1.05, 1.2, 2)))),
    }
    name = random.choice(("run", "command", *changes))
    if name == "run":
        runs = [*runs[: random.randint(0, 2)], fresh()]
    elif name != "command":
        runs[at] = replace(runs[at], **{name: changes[name]})
    return Case(random.choice(COMMANDS) if name == "command" else case.command, tuple(runs))


def search(seconds: float, by: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        node = Node(Store(folder), lambda: None)
        best: list[tuple[tuple[float, float], Case]] = []
        until, tried = time.monotonic() + seconds, 0
        seeds = [
            Case(c, (Run(k, w, t, 1 << 20),))
            for c in COMMANDS
            for t in TEXTS
            for k, w in (("args", "[%s]"), ("u", "%s"))
        ]
        while time.monotonic() < until:
            case = (
                seeds.pop()
                if seeds
                else mutated(random.choice(best)[1])
                if random.random() < 0.9
                else Case("ADD", (fresh(),))
            )
            found, tried = (cost(case, node), case), tried + 1
            if not best or found[0][by] > best[0][0][by]:
                ms, mb = found[0]
                shape = [(run.key, run.within, run.text[:40], run.count) for run in case.runs]
                print(f"{ms:8.2f} ms {mb:6.2f} MB {case.command:7}{len(case.stdin()):8} {shape}", flush=True)
            best = sorted([*best, found], key=lambda each: -each[0][by])[:10]
        print(f"{tried} configs")


if __name__ == "__main__":
    search(
        float(sys.argv[1]) if len(sys.argv) > 1 else 60,
        ("time", "memory").index(sys.argv[2]) if len(sys.argv) > 2 else 0,
    )
