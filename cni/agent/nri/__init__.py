"""A plugin of the Node Resource Interface, by which a container runtime reports pods (github.com/containerd/nri).

connection.py carries messages, client.py registers and answers calls. Must not know what the agent does with a pod.
"""
