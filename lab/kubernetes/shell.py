"""`make cluster`: a shell on the node of a new cluster, with kubectl, helm and ctr. The cluster ends with the shell."""

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

_WELCOME = """The node is Ready. The cluster ends with this shell. Logs: {logs}. The peer of eth1: 10.77.0.254.
The project's images are imported. A stand-in for Multus attaches NetworkAttachmentDefinitions. To install the agent:

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
            # script(1): job control needs a terminal whose session is in the node's pid namespace.
            process = cluster.machine.popen(
                ["script", "-qec", shell, "/dev/null"], env=cluster.environment(), cwd=CHECKOUT
            )
            process.wait()  # its status is that of the last command, which is no failure of this program
    return 0


if __name__ == "__main__":
    sys.exit(main())
