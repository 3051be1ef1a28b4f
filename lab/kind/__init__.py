"""A real kind cluster: kind, kubeadm and docker do what they do for any user, without a registry and without a service.

    docker.py             Debian's dockerd in namespaces of its own; what it has saved is where the next one begins
    node.py build.py      make that: the image of kind's nodes, and docker's build cache for our Dockerfile
    cover.sh network.sh   programs of that image
    multus.py             the stand-in for Multus as a DaemonSet
    cluster.py            the cluster, and how to run anything as a user of that docker
    __main__.py           make kind

What stands in for what a registry or kind's release has:

- node image: made here, as kind makes it, of Debian's packages and Go modules (node.py).
- kindnetd, whose module needs one that the module proxy refuses: network.sh of that image.
- Multus: lab/kubernetes/multus.py.
- the Dockerfile's base image: the one of lab/assets/images.py.

A user's commands do not know of it: `kind`, `docker` and `kubectl` of the lab are first on their PATH. These add an
option or replace an address (cluster.py).

Read of kind v0.30.0: images/base (Dockerfile, entrypoint, units), pkg/build/nodeimage, pkg/cmd/kind/load/docker-image,
and below pkg/cluster/internal: providers/docker/provision.go, create/actions (installcni, installstorage).
"""
