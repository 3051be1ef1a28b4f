"""vmtapd, the resident agent of a node: answers for the shim, hands fds to launchers, heals, reports.

A caller of plugin.handle like the one-shot executable; must not attach or detach in a way of its own.
"""
