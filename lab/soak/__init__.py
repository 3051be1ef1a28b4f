"""The soak: pods come and go for minutes while programs are killed and neighbours are hostile.

    python -m lab.soak [--seconds N] [--seed N] [--json] [--out FOLDER]      (make soak, make soak A="--seconds 600")

scene.py has the agent, its delegate and the peer that answers frames, pods.py attaches, checks and detaches,
launcher.py and neighbours.py are the programs in the pods, watch.py samples the agent and finds what is left, report.py
judges, chart.py draws. Must not know how the plugin works.
"""
