"""The SBOM of images that are made here, with the cases that the project's own do not have.

tests/deploy/manifests/test_sbom.py has those.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from lab import sbom
from lab.process import LabError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Layer = dict[str, bytes | tuple[bytes, str]]
"""Path → a file's content, or the type and target of a link."""

STATUS = b"""Package: dash
Status: install ok installed
Architecture: amd64
Version: 0.5.12-2

Package: libgcc-s1
Status: install ok installed
Architecture: amd64
Source: gcc-12 (12.2.0-14+deb12u1)
Version: 12.2.0-14+b1

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""
BASE: Layer = {
    "etc/os-release": (tarfile.SYMTYPE, "../usr/lib/os-release"),
    "usr/lib/os-release": b'ID=debian\nVERSION_ID="12"\n',
    "var/lib/dpkg/status": STATUS,
    "var/lib/dpkg/info/dash.list": b"/.\n/bin\n/bin/dash\n",
    "var/lib/dpkg/info/libgcc-s1:amd64.list": b"/lib/x86_64-linux-gnu/libgcc_s.so.1\n/usr/lib/os-release\n",
    "usr/bin/dash": b"dash",
    "usr/lib/x86_64-linux-gnu/libgcc_s.so.1": b"gcc",
}
WHEEL: Layer = {
    "opt/lib/python3.12/site-packages/a_b-1.0.dist-info/METADATA": b"Name: A_B\nVersion: 1.0\n\nName: no\n",
    "opt/lib/python3.12/site-packages/a_b-1.0.dist-info/RECORD": b"a.py,sha256=x,1\n../../../bin/a,,\n"
    b"a_b-1.0.dist-info/METADATA,,\na_b-1.0.dist-info/RECORD,,\n",
    "opt/lib/python3.12/site-packages/a.py": b"",
    "opt/lib/python3.12/site-packages/__pycache__/a.cpython-312.pyc": b"",
    "opt/bin/a": b"",
}


def archive(path: Path, layers: list[Layer], *, mode: str = "w", **config: Any) -> Path:
    """Writes an image as docker save does. mode: the layers', "w:gz" for compressed ones."""
    parts: dict[str, bytes] = {}
    for number, layer in enumerate(layers):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload] # a variable mode
            _add(tar, layer)
        parts[f"blobs/{number}"] = buffer.getvalue()
    manifest = [{"Config": "config.json", "RepoTags": ["ghcr.io/a/vmtap:1.2"], "Layers": [*parts]}]
    parts["config.json"] = json.dumps({"architecture": "amd64"} | config).encode()
    with tarfile.open(path, "w") as tar:
        _add(tar, {"manifest.json": json.dumps(manifest).encode(), **parts})
    return path


def _add(tar: tarfile.TarFile, files: Mapping[str, bytes | tuple[bytes, str]]) -> None:
    for name, content in files.items():
        entry = tarfile.TarInfo(name)
        if isinstance(content, tuple):
            entry.type, entry.linkname = content
            tar.addfile(entry)
        else:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def components(path: Path) -> tuple[set[str], dict[str, str]]:
    """The purls of an archive's SBOM, and its files with their SHA-256."""
    bom = json.loads(sbom.make(sbom.read(path)))
    files = {
        each["name"]: each["hashes"][0]["content"] for each in bom["components"] if each["type"] == "file"
    }
    return {each["purl"] for each in bom["components"] if each["type"] != "file"}, files


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_packages_and_their_files(tmp_path: Path, mode: str) -> None:
    purls, files = components(archive(tmp_path / "image", [BASE, WHEEL, {"opt/x": b"x"}], mode=mode))
    assert purls == {
        "pkg:deb/debian/dash@0.5.12-2?arch=amd64&distro=debian-12",
        "pkg:deb/debian/libgcc-s1@12.2.0-14%2Bb1?arch=amd64&distro=debian-12&upstream=gcc-12%4012.2.0-14%2Bdeb12u1",
        "pkg:pypi/a-b@1.0",
    }
    assert files == {"/opt/x": hashlib.sha256(b"x").hexdigest()}


def test_ours_is_in_no_index(tmp_path: Path) -> None:
    ours: Layer = {"s/vmtap_cni-2.dist-info/METADATA": b"Name: vmtap-cni\nVersion: 2\n"}
    purls, files = components(archive(tmp_path / "image", [ours]))
    assert purls == {"pkg:generic/vmtap-cni@2"}
    assert files.keys() == {"/s/vmtap_cni-2.dist-info/METADATA"}  # without a RECORD it owns nothing


def test_whiteouts_and_links(tmp_path: Path) -> None:
    lower: Layer = dict.fromkeys(("a/b", "a/c", "d/e/f", "d/g", "h", "i/j", "k"), b"lower")
    upper: Layer = {
        "a/.wh.b": b"",
        "d/h": b"upper",
        "d/.wh..wh..opq": b"",
        "h": (tarfile.SYMTYPE, "a"),
        ".wh.i": b"",
        "l": (tarfile.LNKTYPE, "k"),
    }
    _, files = components(archive(tmp_path / "image", [lower, upper]))
    assert files.keys() == {"/a/c", "/d/h", "/k", "/l"}
    assert files["/l"] == files["/k"] == hashlib.sha256(b"lower").hexdigest()
    assert files["/d/h"] == hashlib.sha256(b"upper").hexdigest()


def test_a_folder_becomes_a_file(tmp_path: Path) -> None:
    _, files = components(archive(tmp_path / "image", [{"a/b": b"", "a/c/d": b""}, {"a": b"1"}]))
    assert files.keys() == {"/a"}


def test_the_interpreter_of_dockers_image(tmp_path: Path) -> None:
    names = (
        *("bin/python3.12", "bin/pydoc3.12", "lib/libpython3.12.so.1.0", "lib/python3.12/os.py"),
        *("lib/python3.12/lib-dynload/_ssl.so", "include/python3.12/Python.h", "lib/pkgconfig/python3.pc"),
    )
    others = ("bin/other", "lib/python3.12/site-packages/other.py", "lib/libother.so")
    layer: Layer = {f"usr/local/{name}": b"" for name in (*names, *others)}
    environment = {"Env": ["PATH=/usr/bin", "PYTHON_VERSION=3.12.15"]}
    purls, files = components(archive(tmp_path / "image", [layer], config=environment))
    assert purls == {"pkg:generic/python@3.12.15"}
    assert files.keys() == {f"/usr/local/{name}" for name in others}
    purls, files = components(archive(tmp_path / "image", [layer]))
    assert not purls
    assert len(files) == len(layer)


def test_equal_images_have_equal_sboms(tmp_path: Path) -> None:
    created = "2026-10-05T01:02:03.123456789Z"
    one, two = (archive(tmp_path / name, [BASE, WHEEL], created=created) for name in "12")
    text = sbom.make(sbom.read(one))
    assert text == sbom.make(sbom.read(two))
    assert json.loads(text)["metadata"]["timestamp"].startswith("2026-10-05T01:02:03")
    assert text != sbom.make(sbom.read(archive(tmp_path / "3", [BASE], created=created)))


def test_what_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong"
    with tarfile.open(wrong, "w") as tar:
        _add(tar, {"manifest.json": b"[]"})
    (tmp_path / "text").write_text("text")
    for path in (wrong, tmp_path / "text", tmp_path / "none"):
        with pytest.raises(LabError, match=f"{path} is not an archive of one image"):
            sbom.read(path)
    assert sbom.main([str(wrong)]) == 1
    assert sbom.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 2
