"""Makes BUILD of lab/assets/kind.py: python -m lab.kind.build FOLDER."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lab.assets.cache import CACHE, CHECKOUT
from lab.assets.images import NAMES
from lab.assets.kind import NODE
from lab.kind.docker import BASE_IMAGE, Docker


def make(target: Path) -> None:
    """docker's build cache: the layers of all targets of the Dockerfile. Few of them depend on our sources."""
    with (
        tempfile.TemporaryDirectory(prefix="kind-build.", dir=CACHE) as logs,
        Docker(Path(logs), [NODE.get()], internet=True) as docker,
    ):
        for each in NAMES:
            print(f"lab.kind.build: {each}", file=sys.stderr, flush=True)
            arguments = [f"--build-arg=BASE={BASE_IMAGE}", "--tag=cached", f"--target={each}"]
            docker.run(["docker", "build", *arguments, "."], cwd=CHECKOUT, timeout=None)
        docker.run(["docker", "image", "rm", "cached"])
        docker.run(["docker", "image", "prune", "--force"])
        # The only folders that a later build would write to.
        docker.run(["docker", "builder", "prune", "--force", "--filter=type=source.local"])
        docker.save(target)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
