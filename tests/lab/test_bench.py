"""The benchmark's arithmetic and its page; nothing here measures."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from xml.etree import ElementTree

import pytest

from lab.bench import chart, figures, interpreter, node, quiet, report, syscalls
from lab.bench import page as bench_page
from lab.bench.contenders import (
    AGENT,
    AGENT_CHECKED,
    AGENT_GUARDED,
    AGENT_VF,
    GO_MACVLAN,
    KERNEL,
    ONE_SHOT,
    PEER,
    Sample,
)
from lab.bench.figures import Budget, Row, Spread
from lab.bench.floors import Floors
from lab.bench.frames import NONE
from lab.bench.guests import DIRECTIONS, MACVTAP, TAP, USER
from lab.bench.interpreter import Memory
from lab.bench.quiet import Waited
from lab.bench.syscalls import Calls


def test_quantiles_lie_between_the_values() -> None:
    assert figures.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert figures.quantile([1.0, 2.0], 0.5) == 1.5
    assert figures.quantile([10.0, 20.0, 30.0, 40.0, 50.0], 0.1) == pytest.approx(14.0)
    assert figures.quantile([7.0], 0.9) == 7.0


def test_a_spread_is_not_moved_by_one_outlier() -> None:
    assert figures.spread([1.0] * 19 + [1000.0]) == Spread(1.0, 1.0, 1.0, 20)
    with pytest.raises(ValueError, match="nothing was measured"):
        figures.spread([])


def test_ratios_are_of_one_round() -> None:
    assert figures.ratios([1.0, 10.0], [2.0, 20.0]) == [0.5, 0.5]
    with pytest.raises(ValueError, match="shorter"):
        figures.ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("budget", "value", "verdict"),
    [
        (Budget("less", 0.35, 0.2), 0.2, "aim"),
        (Budget("less", 0.35, 0.2), 0.21, "must"),
        (Budget("less", 0.35, 0.2), 0.36, "missed"),
        (Budget("more", 2, 3, more=True), 3, "aim"),
        (Budget("more", 2, 3, more=True), 2.9, "must"),
        (Budget("more", 2, 3, more=True), 1.9, "missed"),
    ],
)
def test_verdicts(budget: Budget, value: float, verdict: str) -> None:
    assert budget.verdict(value) == verdict


def test_what_was_not_measured_is_said() -> None:
    row = Row(report.TO_PEER, None, report.NO_PEER)
    assert row.verdict == "not measured"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.04123, "0.0412"), (1.234, "1.23"), (45.61, "45.6"), (1234.5, "1234")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert figures.number(value) == text


def test_everybody_begins_as_often() -> None:
    orders = list(node.turns(["a", "b", "c"], 6))
    assert [order[0] for order in orders] == ["a", "b", "c", "a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def _measured() -> report.Measured:
    def samples(*names: str, scale: float = 1.0) -> node.Samples:
        times = {
            AGENT: 1.0,
            AGENT_CHECKED: 1.25,
            AGENT_GUARDED: 1.3,
            ONE_SHOT: 50.0,
            GO_MACVLAN: 5.0,
            KERNEL: 0.2,
        }
        return {
            name: {
                command: [Sample(times[name] * scale * slow, times[name], 1024) for slow in (1.0, 3.0)]
                for command in node.COMMANDS
            }
            for name in names
        }

    everybody = samples(AGENT, AGENT_CHECKED, AGENT_GUARDED, ONE_SHOT, GO_MACVLAN, KERNEL)
    return report.Measured(
        quick=True,
        extent=node.QUICK,
        single=everybody,
        many=samples(AGENT, GO_MACVLAN),
        crowds={
            0: samples(AGENT, ONE_SHOT, GO_MACVLAN, KERNEL),
            100: samples(AGENT, ONE_SHOT, GO_MACVLAN, KERNEL, scale=2.0),
        },
        soak=node.Soak([(0, 10240), (250, 20480), (500, 20480)]),
        launches=[40.0, 60.0],
        frames={part: {"out": [100.0 * slow], "in": [200.0]} for slow, part in ((1, NONE), (2, "rate"))},
        empty=[Sample(0.3, 0.2, 64)],
        floors=Floors([0.4], [0.8]),
        handled=[0.5],
        calls=Calls({"read": 3.0, "write": 1.0}, {"openat": 20.0, "futex": 0.01}),
        starts={
            part: [Sample(wall, wall, 1024)]
            for part, wall in (
                (interpreter.BARE, 5.0),
                (interpreter.LIBRARY, 20.0),
                (interpreter.MODULES, 45.0),
            )
        },
        parts={
            part: Memory(own << 10, 5 << 10)
            for own, part in enumerate(
                (
                    interpreter.BARE,
                    interpreter.LIBRARY,
                    interpreter.MODULES,
                    interpreter.YAML,
                    interpreter.GRPC,
                ),
                1,
            )
        },
        resident=Memory(14 << 10, 6 << 10),
        with_devices=Memory(22 << 10, 18 << 10),
        waited=Waited(12.0, 0.5),
        emulated={},
        not_emulated="no such machine",
        others=0.25,
        guests={
            medium: {way: [speed] for way in DIRECTIONS}
            for medium, speed in ((MACVTAP, 30.0), (TAP, 20.0), (USER, 10.0))
        },
    )


def test_the_budget_is_judged_by_ratios() -> None:
    rows = {row.budget.figure: row for row in report.rows(_measured())}
    value = rows["agent ADD ÷ Go macvlan without IPAM"].value
    assert value
    assert (value.median, value.low, value.high) == (0.2, 0.2, 0.2)
    assert rows["agent ADD with macSpoofCheck ÷ without"].verdict == "missed"
    assert rows["agent ADD with a whole port ÷ without"].verdict == "aim"
    assert rows["agent ADD with 100 attachments ÷ with none"].verdict == "must"
    assert rows["launcher, start to exec of QEMU"].verdict == "must"
    assert rows["its growth over the second half of them"].verdict == "aim"
    assert rows["guest TX + RX, macvtap ÷ user networking"].verdict == "aim"
    assert rows[report.TO_PEER.figure].verdict == "not measured"
    assert PEER not in _measured().single


def test_the_page_has_every_row_and_says_what_is_left_out() -> None:
    page = bench_page.markdown(_measured(), {"date": "today"})
    for row in report.rows(_measured()):
        assert f"| {row.budget.figure} |" in page
    assert report.NO_PEER in page
    assert "| the agent's work, by its log, without RTM_NEWLINK | 0.100 | 5 % | 20 of the agent |" in page
    assert "| agent | openat 20 |" in page
    assert "| waited for a quiet machine | 12 s, and it was not quiet then |" in page
    assert "| used by others during the run | 25 % |" in page
    assert bench_page.NO_VLANS in page
    assert "| rate | 5 000 000 | 0.500 | 5 000 000 | 1.00 |" in page
    assert "benchmark.svg" in page


def test_the_rows_of_the_emulated_machine() -> None:
    assert "Not measured: no such machine." in bench_page.markdown(_measured(), {})
    samples = {
        name: {command: [Sample(wall * slow, 1.0, 1) for slow in (1.0, 5.0)] for command in node.COMMANDS}
        for name, wall in ((AGENT, 10.0), (AGENT_VF, 30.0))
    }
    page = bench_page.markdown(replace(_measured(), emulated=samples, not_emulated=""), {})
    assert f"| ADD | {AGENT_VF} | 90.0 | 3.00 | 3.00 to 3.00 |" in page
    assert "Not measured" not in page


@pytest.mark.parametrize(
    ("head", "columns"), [("ADD of the agent", [1]), ("ADD of the one-shot", [1, 3]), ("MB", [1, 2, 3, 4])]
)
def test_the_parts_of_a_figure_are_all_of_it(head: str, columns: list[int]) -> None:
    page = bench_page.markdown(_measured(), {"date": "today"})
    (table,) = (part for part in page.split("\n\n") if part.startswith(f"| {head} |"))
    *parts, whole = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:])
    assert len(parts) > 3
    for column in columns:
        assert sum(float(cells[column] or 0) for cells in parts) == pytest.approx(float(whole[column]))


def test_the_floor_is_an_empty_process_and_the_kernel() -> None:
    page = bench_page.markdown(_measured(), {"date": "today"})
    line = next(line for line in page.splitlines() if line.startswith(f"| ADD | {GO_MACVLAN} | 10.0 | 6.00"))
    assert line.split(" | ")[5] == "14.3"  # 10 / (0.4 + 0.3)


def test_a_wide_row_says_so() -> None:
    measured = replace(_measured(), launches=[40.0, 40.0, 90.0, 90.0])
    rows = {row.budget.figure: row for row in report.rows(measured)}
    row = rows["launcher, start to exec of QEMU"]
    assert "p10 to p90 is 77 % of the median" in row.why
    assert row.why in bench_page.markdown(measured, {})
    assert not rows["agent DEL ÷ Go macvlan"].why


def test_a_step_is_repeated_while_its_figures_spread() -> None:
    """Three times at most; the narrowest counts."""
    cases = (([0.2], 1, 0.2), ([0.9, 0.1], 2, 0.1), ([0.9, 0.6, 0.8, 0.1], 3, 0.6))
    for widths, tries, kept in cases:
        left, notes = list(widths), list[str]()
        measured = node.steadied(
            3,
            partial(left.pop, 0),
            lambda width: [Spread(1.0, 1.0, 1.1, 9), Spread(1.0, 1.0, 1.0 + width, 9)],
            notes.append,
        )
        assert (measured, len(widths) - len(left)) == (kept, tries)
        assert len(notes) == sum(width > figures.WIDE for width in widths[:tries])


def test_the_wait_for_a_quiet_machine() -> None:
    def waited(busy: list[float]) -> tuple[quiet.Waited, list[str]]:
        looks, told = iter(busy), list[str]()
        clock = iter(range(100))
        return quiet.wait(5.0, told.append, lambda: next(looks), lambda: float(next(clock))), told

    calm, told = waited([0.9, 0.05, 0.05, 0.05, 1.0])
    assert (calm, calm.quiet) == (quiet.Waited(4.0, 0.05), True)
    assert told[0] == "processors 90 % busy, 10 % is quiet; goes on within 4 s"
    restless, _ = waited([0.05, 0.9] * 5)
    assert restless.seconds == 5.0
    busy, _ = waited([0.9] * 9)
    assert (busy, busy.quiet) == (quiet.Waited(5.0, 0.9), False)


def test_busy_processors() -> None:
    hertz = os.sysconf("SC_CLK_TCK")
    assert quiet.used("cpu  10 20 30 400 50 6 7 8 9 1\ncpu0 1 2 3 4 5 6 7 8 9 1\n") == pytest.approx(
        81 / hertz
    )


def test_straces_summary() -> None:
    text = """    calls syscall
--------- ----------------
       29 read
        2 close
      145 futex
--------- ----------------
       31 total
"""
    assert syscalls.parse(text) == {"read": 29, "close": 2}


def test_the_chart_is_xml_with_a_bar_for_each() -> None:
    bars = [
        chart.Bar("ours <1>", Spread(1.0, 0.9, 1.1, 9), "ours"),
        chart.Bar("b", Spread(50.0, 40.0, 60.0, 9), "bar"),
    ]
    picture = ElementTree.fromstring(chart.draw([chart.Panel("ADD", "ms", bars)], "a note"))  # noqa: S314 - ours
    name = "{http://www.w3.org/2000/svg}"
    page, *rects = picture.iter(f"{name}rect")
    assert page.get("class") == "page"  # so that it is legible wherever it is shown
    widths = [float(rect.get("width", "")) for rect in rects]
    assert len(widths) == 2
    assert 0 < widths[0] < widths[1]
    assert "ours <1>" in [text.text for text in picture.iter(f"{name}text")]


def test_what_an_aim_leaves() -> None:
    """Of 0.2 of Go macvlan's 10 ms, an empty process and the kernel take 0.7 ms, and the agent takes 2 ms."""
    page = bench_page.markdown(_measured(), {})
    assert "| ADD | 2.00 | 0.700 | 1.30 | 1.30 |" in page
    assert "| ADD with a whole port, beyond one without | 0.600 | 0.800 | -0.200 | -0.200 |" in page
