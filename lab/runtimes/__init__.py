"""Container runtimes on a node of the lab: a machine to run them on, containerd by its CRI, podman, images for them."""
