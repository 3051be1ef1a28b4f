"""vmtap: a CNI plugin that attaches virtual machines in pods straight to a physical NIC.

Importing this package must cost nothing: a runtime starts the executable for each pod that comes or goes.
"""
