"""The SBOMs of the images that the Dockerfile makes, against what dpkg, Python and tar find in them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from lab import sbom
from lab.assets import images

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
UNOWNED = re.compile(
    r"/(etc|run|root|var)/.*|/usr/share/info/dir|/opt/vmtap/(pyvenv\.cfg|bin/[aA]ctivate(\.\w+)?)"
)
"""Where files that no package lists may be: configuration and state, and what venv writes."""
TARGETS = [*images.NAMES]


class Unpacked:
    """An image's files in a folder, by tar(1), and its SBOM."""

    def __init__(self, target: str, folder: Path) -> None:
        archive = images.archives()[images.NAMES[target]]
        self.root = folder / "root"
        self.root.mkdir()
        (folder / "archive").mkdir()
        subprocess.run(["tar", "-xf", archive, "-C", folder / "archive"], check=True)
        [manifest] = json.loads((folder / "archive/manifest.json").read_text())
        for layer in manifest["Layers"]:
            subprocess.run(["tar", "-xf", folder / "archive" / layer, "-C", self.root], check=True)
            for whiteout in self.root.rglob(".wh.*"):
                gone = whiteout.with_name(whiteout.name.removeprefix(".wh."))
                subprocess.run(["rm", "-rf", whiteout, gone], check=True)
        self.text = sbom.make(sbom.read(archive))
        self.bom: dict[str, Any] = json.loads(self.text)
        self.purls = [each["purl"] for each in self.bom["components"] if each["type"] != "file"]
        self.files = {
            each["name"]: each["hashes"][0]["content"]
            for each in self.bom["components"]
            if each["type"] == "file"
        }

    def dpkg(self, *words: str) -> list[str]:
        command = ["dpkg-query", f"--admindir={self.root}/var/lib/dpkg", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    def distributions(self) -> list[Distribution]:
        folders = {str(path.parent) for path in self.root.rglob("*.dist-info")}
        return [*distributions(path=[*folders])]


@pytest.fixture(scope="module", params=TARGETS)
def image(request: pytest.FixtureRequest) -> Iterator[Unpacked]:
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep its own, of several 100 MB
        yield Unpacked(request.param, Path(folder))


def test_it_is_valid(image: Unpacked) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(image.text) is None
    subject = image.bom["metadata"]["component"]
    assert f"ghcr.io/vmtap/{subject['name']}:{subject['version']}" in images.NAMES.values()


def test_each_debian_package(image: Unpacked) -> None:
    installed = image.dpkg("-W", "-f", "${Package}@${Version} ${Architecture}\n")
    assert "libc6" in {line.partition("@")[0] for line in installed}
    named = [purl.removeprefix("pkg:deb/debian/") for purl in image.purls if purl.startswith("pkg:deb/")]
    assert sorted(
        re.sub(r"\?arch=(\w+)&distro=debian-12.*", r" \1", purl).replace("%2B", "+") for purl in named
    ) == sorted(installed)


def test_each_python_package(image: Unpacked) -> None:
    named = {purl for purl in image.purls if not purl.startswith("pkg:deb/")}
    own = f"pkg:generic/vmtap-cni@{images.VERSION}"
    assert own in named
    locked = {
        f"pkg:pypi/{name}@{version}"
        for name, version, marker in re.findall(
            r"^([\w.-]+)==([\w.]+)( ; .*)?", (ROOT / "deploy/requirements.lock").read_text(), re.M
        )
        if "win32" not in marker
    }
    if "launcher" in image.bom["metadata"]["component"]["name"]:
        locked = {purl for purl in locked if purl.startswith("pkg:pypi/pycdlib@")}
    assert named == {own} | locked
    assert len(image.distributions()) == len(named)


def test_each_file(image: Unpacked) -> None:
    """Those of no package are named; none of them is a program."""
    owned = {str(path) for each in image.distributions() for path in map(each.locate_file, each.files or ())}
    owned = {str(Path(path).resolve()) for path in owned}
    listed = {name for name in image.dpkg("-L", *image.dpkg("-W", "-f", "${binary:Package}\n")) if name}
    # Its own links lead out of the folder: only the merge of / and /usr is followed.
    merged = (re.sub(r"^/(bin|sbin|lib|lib64)/", r"/usr/\1/", name) for name in listed)
    owned |= {f"{image.root}{name}" for name in merged}
    found: dict[str, str] = {}
    for path in image.root.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.is_relative_to(image.root / "var/lib/dpkg"):
            continue
        compiled = path.parent.parent / f"{path.name.partition('.')[0]}.py"
        if str(path) not in owned and not (path.suffix == ".pyc" and str(compiled) in owned):
            data = path.read_bytes()
            found[f"/{path.relative_to(image.root)}"] = hashlib.sha256(data).hexdigest()
            assert not data.startswith(b"\x7fELF"), path
    assert image.files == found
    assert not [name for name in found if not UNOWNED.fullmatch(name)]
