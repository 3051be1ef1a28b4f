"""vmtapd, the resident agent of a node: answers the shim, gives fds to launchers, reconciles, exports metrics.

Calls plugin.handle as the one-shot executable does; must not attach or detach by itself.
"""
