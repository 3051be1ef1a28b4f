"""`make cluster`: a shell on the node of a Kubernetes of one's own, with kubectl, helm and ctr; all ends with it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from lab.assets.cache import CHECKOUT
from lab.assets.images import archives
from lab.kubernetes import multus
from lab.kubernetes.cluster import Cluster
from lab.wire import Lab

_WELCOME = """The node is Ready, and ends with this shell. Logs: {logs}. The peer on eth1's network: 10.77.0.254.
The images are imported; a stand-in for Multus attaches what a NetworkAttachmentDefinition names. To install the agent:

  helm install vmtap deploy/helm/vmtap --namespace vmtap-system --create-namespace \\
    --set-json 'interfaces=[{{"name": "dataplane", "source": {{"dev": "eth1"}}}}]'
"""


def main() -> int:
    images = archives()
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="vmtap-cluster-") as logs:
        print("starting …", file=sys.stderr)
        with Cluster(lab, Path(logs)) as cluster:
            multus.install(cluster)
            for name, archive in images.items():
                cluster.load(archive, name)
            print(_WELCOME.format(logs=logs), file=sys.stderr)
            shell = shutil.which(os.environ.get("SHELL", "")) or "/bin/sh"
            # script: a terminal of the node's own, since job control needs a session of its pid namespace.
            process = cluster.machine.popen(
                ["script", "-qec", shell, "/dev/null"], env=cluster.environment(), cwd=CHECKOUT
            )
            process.wait()  # its status is the last command's, and nobody's failure
    return 0


if __name__ == "__main__":
    sys.exit(main())
