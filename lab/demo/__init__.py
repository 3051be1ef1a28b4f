"""The demo: virtual machines talk over macvtap and tap in every mode, and every cell of the table is measured.

    python -m lab.demo [--json]      (make demo, make demo A=--json)

cases.py has what is expected, reach.py measures it, show.py prints it, ending.py ends it early.
"""
