"""vmtapctl, the operator's command: what is attached on this node, to what, for whom, and what is wrong.

Looks and never changes: nothing here writes state, opens a queue of an attachment, or needs the agent. The only
importer of rich and argcomplete.
"""
