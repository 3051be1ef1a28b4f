"""The software bill of materials of a container image, in CycloneDX JSON 1.6.

    python -m lab.sbom ARCHIVE           prints that of an archive, as `docker save` and the lab write them
    python -m lab.sbom --lab FOLDER      writes FOLDER/TARGET.cdx.json for each image that the lab built

It lists the packages in dpkg's database, those with a *.dist-info of Python, and the interpreter that Docker's Python
image builds into /usr/local. Each regular file that belongs to none of them is a component of its own, with its
SHA-256; dpkg's database itself is left out. Libraries that a wheel or the shim contains in compiled form are not
recognized. Equal images have equal SBOMs.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from dataclasses import dataclass
from datetime import datetime
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_READ = re.compile(
    r"/etc/os-release|/usr/lib/os-release|/var/lib/dpkg/(status|info/[^/]+\.list)|.*\.dist-info/(METADATA|RECORD)"
)
"""The files whose content is needed; of the others, the digest is."""
_MERGED = re.compile(r"/(bin|sbin|lib|lib32|lib64|libx32)/")
"""Links to folders of /usr since Debian 12: dpkg's lists have the names before the merge."""
_COMPILED = re.compile(r"__pycache__/([^/]+)\.cpython-\d+(\.opt-\d)?\.pyc$")
_INTERPRETER = re.compile(
    r"/usr/local/(bin/(python|pydoc|idle|2to3)[^/]*|(lib|lib/pkgconfig|share/man/man1)/(lib)?python[^/]*"
    r"|(include|lib)/python3\.\d+/(?!site-packages/).*)"
)
_OWN = "vmtap-cni"
_NAMESPACE = UUID("6f9c1f0e-6d0b-5f57-9c0c-2f3c1d7e0a4b")
"""Of the serial numbers: an arbitrary constant."""


@dataclass(frozen=True)
class File:
    """A regular file of an image. content is None if it is not one of _READ."""

    sha256: str
    content: bytes | None = None


@dataclass(frozen=True)
class Image:
    """An image's configuration, the SHA-256 of it, and its regular files by path from the root."""

    name: str
    config: dict[str, Any]
    id: str
    files: dict[str, File]

    def text(self, path: str) -> str:
        """A file's text, or "" if there is no such file."""
        file = self.files.get(path)
        return (file.content or b"").decode() if file else ""


def read(archive: Path) -> Image:
    """Reads an archive with the manifest.json of one image. Raises LabError if it is something else."""
    try:
        with tarfile.open(archive) as tar:
            [entry] = json.loads(_content(tar, "manifest.json"))
            config = _content(tar, entry["Config"])
            files: dict[str, File] = {}
            for name in entry["Layers"]:
                with tarfile.open(fileobj=tar.extractfile(name)) as layer:
                    _apply(layer, files)
    except (KeyError, ValueError, OSError, tarfile.TarError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise LabError(f"{archive} is not an archive of one image: {reason}") from error
    name = (entry["RepoTags"] or [""])[0]
    return Image(name, json.loads(config), hashlib.sha256(config).hexdigest(), files)


def _content(tar: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _apply(layer: tarfile.TarFile, files: dict[str, File]) -> None:
    """Changes files as a layer does. Whiteouts remove what lower layers have (OCI image specification, layer.md)."""
    below: dict[str, list[str]] = {}
    for path in files:
        for parent in PurePosixPath(path).parents:
            below.setdefault(str(parent), []).append(path)

    def remove(path: str) -> None:
        files.pop(path, None)
        for lower in below.get(path, ()):
            files.pop(lower, None)

    members = {str(PurePosixPath("/", member.name)): member for member in layer}
    for path in members:
        folder, _, name = path.rpartition("/")
        if name.startswith(".wh."):
            remove(folder if name == ".wh..wh..opq" else f"{folder}/{name.removeprefix('.wh.')}")
    for path, member in members.items():
        if member.isdir() or "/.wh." in path:
            continue
        remove(path)
        if member.islnk():
            files[path] = files[str(PurePosixPath("/", member.linkname))]
        elif member.isfile():
            data = _content(layer, member)
            files[path] = File(hashlib.sha256(data).hexdigest(), data if _READ.fullmatch(path) else None)


def make(image: Image) -> str:
    """The SBOM of an image, as JSON."""
    owned: set[str] = set()
    components = [*_debian(image, owned), *_python(image, owned), *_interpreter(image, owned)]
    for path, file in image.files.items():
        source = _COMPILED.sub(r"\1.py", path).replace("__pycache__/", "")
        if not {path, source} & owned and not path.startswith("/var/lib/dpkg/"):
            components.append(
                Component(
                    type=ComponentType.FILE,
                    name=path,
                    bom_ref=f"file:{path}",
                    hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file.sha256)],
                )
            )
    name, _, version = image.name.rpartition("/")[2].partition(":")
    bom = Bom(components=components, serial_number=uuid5(_NAMESPACE, image.id))
    bom.metadata.component = Component(
        type=ComponentType.CONTAINER,
        name=name,
        version=version,
        bom_ref=f"image:{name}",
        properties=[
            Property(name="vmtap:image:id", value=f"sha256:{image.id}"),
            Property(name="vmtap:image:architecture", value=image.config["architecture"]),
        ],
    )
    if "created" in image.config:
        bom.metadata.timestamp = datetime.fromisoformat(image.config["created"])
    bom.register_dependency(bom.metadata.component, components)
    return JsonV1Dot6(bom).output_as_string(indent=1)


def _debian(image: Image, owned: set[str]) -> Iterator[Component]:
    """The packages in dpkg's database. Adds their files to owned."""
    release = image.text("/etc/os-release") or image.text("/usr/lib/os-release")
    system = dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)', release, re.M))
    vendor = system.get("ID", "debian")
    distribution = f"{vendor}-{system.get('VERSION_ID', 'sid')}"
    for stanza in image.text("/var/lib/dpkg/status").split("\n\n"):
        package = Parser().parsestr(stanza)
        if not package["Status"] or package["Status"].split()[-1] in ("not-installed", "config-files"):
            continue
        name, version, architecture = package["Package"], package["Version"], package["Architecture"]
        qualifiers = {"arch": architecture, "distro": distribution}
        if package["Source"]:  # with a version if it is not the package's: "gcc-12 (12.2.0-14)"
            qualifiers["upstream"] = re.sub(r" \((.*)\)", r"@\1", package["Source"])
        for qualified in (name, f"{name}:{architecture}"):
            listed = image.text(f"/var/lib/dpkg/info/{qualified}.list").splitlines()
            owned.update(
                _MERGED.sub(r"/usr/\1/", path, count=1) if _MERGED.match(path) else path for path in listed
            )
        yield _component(PackageURL("deb", vendor, name, version, qualifiers))


def _python(image: Image, owned: set[str]) -> Iterator[Component]:
    """The installed Python packages. Adds their files to owned. Ours is in no index, which its purl must not claim."""
    for path in list(image.files):
        if not path.endswith(".dist-info/METADATA"):
            continue
        folder = PurePosixPath(path).parent
        package = Parser().parsestr(image.text(path), headersonly=True)
        name = re.sub(r"[-_.]+", "-", package["Name"]).lower()
        for line in image.text(f"{folder}/RECORD").splitlines():
            owned.add(_normal(folder.parent, line.rsplit(",", 2)[0].strip('"')))
        yield _component(PackageURL("generic" if name == _OWN else "pypi", None, name, package["Version"]))


def _normal(folder: PurePosixPath, relative: str) -> str:
    parts: list[str] = []
    for part in (folder / relative).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return str(PurePosixPath(*parts))


def _interpreter(image: Image, owned: set[str]) -> Iterator[Component]:
    """Docker's Python image builds the interpreter into /usr/local, and has its version in the environment."""
    environment: Mapping[str, str] = dict(
        word.split("=", 1) for word in image.config.get("config", {}).get("Env") or ()
    )
    if version := environment.get("PYTHON_VERSION"):
        owned.update(filter(_INTERPRETER.fullmatch, image.files))
        yield _component(PackageURL("generic", None, "python", version))


def _component(purl: PackageURL) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        name=purl.name,
        version=purl.version,
        purl=purl,
        bom_ref=str(purl),
    )


def main(words: list[str]) -> int:
    try:
        match words:
            case ["--lab", folder]:
                from lab.assets import images  # noqa: PLC0415 - a release has no lab

                Path(folder).mkdir(parents=True, exist_ok=True)
                for archive in images.archives().values():
                    Path(folder, f"{archive.stem}.cdx.json").write_text(make(read(archive)) + "\n")
            case [path] if not path.startswith("-"):
                print(make(read(Path(path))))
            case _:
                print("usage: python -m lab.sbom ARCHIVE | --lab FOLDER", file=sys.stderr)
                return 2
    except LabError as error:
        print(f"lab.sbom: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
