"""vmtapctl, the operator's command: the attachments of this node, their devices, pods and VMs, and their faults.

Nothing here opens a queue of an attachment or needs the agent. Only install, uninstall and probe change anything. The
only importer of rich and argcomplete.
"""
