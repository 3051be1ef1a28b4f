"""The benchmark: what an attachment, a launch and a guest's traffic cost, beside the peers of the same run.

    python -m lab.bench [--quick] [--json]      (make bench, make bench A=--quick)

figures.py counts, spawn.* starts and measures processes, contenders.py are those who are compared, node.py and
guests.py measure, report.py and chart.py write docs/benchmark.md and docs/benchmark.svg.
"""
