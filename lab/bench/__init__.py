"""The benchmark: the cost of an attachment, of a launch and of a guest's traffic, beside other plugins in one run.

    python -m lab.bench [--quick] [--json]      (make bench, make bench A=--quick)

contenders.py has the plugins that are compared, node.py and guests.py measure, spawn.* starts and measures processes,
figures.py computes, report.py and chart.py write docs/benchmark.md and docs/benchmark.svg.
"""
