"""Lists and makes the assets (lab/assets/__init__.py). Prints no progress: lab/setup does."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from lab.assets import guest, hardware, images, kind, programs
from lab.assets.cache import Asset
from lab.process import LabError


@dataclass(frozen=True)
class Step:
    """Assets that lab/setup makes in one step.

    text: describes it; without: what is left out if the step may fail; also: other targets that need the assets.
    """

    text: str
    assets: tuple[Asset, ...]
    without: str = ""
    also: tuple[str, ...] = ()

    def needed(self, target: str) -> bool:
        """Whether `lab/setup TARGET` makes them. Every target includes those of the demo."""
        return target in self.also or any(asset.setup in ("demo", target) for asset in self.assets)

    def missing(self) -> bool:
        return not all(asset.path.exists() for asset in self.assets)


STEPS = {
    "guest": Step("guest: Debian's cloud kernel, a busybox initramfs", (guest.KERNEL, guest.INITRAMFS)),
    "clients": Step("cnitool and the reference plugins", (programs.CLIENTS,)),
    "kubevirt": Step("the fields of KubeVirt's objects", tuple(programs.KUBEVIRT.values())),
    "bench": Step("the benchmark's peers, and the programs that measure", (programs.BENCH,)),
    # Newer than this Debian release: there may be no such packages.
    "hardware": Step(
        "emulated machine with an SR-IOV NIC: QEMU and kernel of Debian's backports",
        (hardware.QEMU, hardware.INITRAMFS),
        without="tests/hw",
    ),
    "manifests": Step(
        "helm, kustomize, and the schemas of what they generate", (programs.MANIFESTS,), also=("kind",)
    ),
    "cluster": Step(
        "Kubernetes, etcd and containerd from their Go modules: ten minutes, once",
        (programs.CLUSTER,),
        also=("kind",),
    ),
    "images": Step("the images of the Dockerfile, on a base image made here", (images.IMAGES,)),
    "docker": Step("docker and slirp4netns, of Debian's packages", (kind.DOCKER,)),
    "kind": Step(
        "kind, and programs of its nodes, from their Go modules: three minutes, once", (kind.PROGRAMS,)
    ),
    "kind-node": Step("the image of kind's nodes: a minute or two", (kind.NODE,)),
    "kind-build": Step("docker's build cache for the Dockerfile: two minutes", (kind.BUILD,)),
}


def main(words: list[str]) -> int:
    match words:
        case []:
            for name, step in STEPS.items():
                print(f"{name:10} {'missing' if step.missing() else 'there':8} {step.text}")
        case ["missing", target]:
            for name, step in STEPS.items():
                if step.needed(target) and step.missing():
                    print(name, step.text, step.without, sep="\t")
        case ["make", *names] if names and set(names) <= set(STEPS):
            try:
                for asset in (asset for name in names for asset in STEPS[name].assets):
                    asset.ensure()
            except LabError as error:
                print(f"lab.assets: {error}", file=sys.stderr)
                return 1
        case _:
            print(
                f"usage: python -m lab.assets [missing TARGET | make NAME...]; names: {', '.join(STEPS)}",
                file=sys.stderr,
            )
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
