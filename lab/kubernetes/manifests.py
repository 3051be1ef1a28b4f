"""Validation of what the chart and the kustomizations generate, against the APIs' own schemas made strict.

An API server drops a field that it does not know; here that is an error. lab/assets/programs.py has schemas and tools.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from lab import process
from lab.assets.programs import MANIFESTS

Document = dict[str, Any]

_METADATA = {"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}


def run(program: str, *words: str | Path, values: Document | None = None) -> str:
    """The output of helm or kustomize; helm takes values by `-f -`. Raises LabError."""
    command = [MANIFESTS.get() / program, *words]
    return process.run(command, stdin=json.dumps(values), timeout=120).stdout


def objects(text: str) -> list[Document]:
    """The objects in the output of `helm template` or `kustomize build`."""
    return [each for each in yaml.safe_load_all(text) if each]


def faults(document: Document) -> list[str]:
    """The errors of an object against its schema, each with path and reason."""
    kind = document.get("apiVersion"), document.get("kind")
    schema = _schemas().get(kind)
    if schema is None:
        return [f"no schema knows a {kind[1]} of {kind[0]}"]
    found = jsonschema.Draft7Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


@cache
def _schemas() -> dict[tuple[Any, Any], Document]:
    """(apiVersion, kind) → JSON schema."""
    folder = MANIFESTS.get()
    definitions = json.loads((folder / "swagger.json").read_text())["definitions"]
    schemas = {}
    for name, definition in definitions.items():
        _make_strict(definition)
        if name.endswith(".Quantity"):
            definition["type"] = ["string", "number"]
        for each in definition.get("x-kubernetes-group-version-kind", ()):
            api = f"{each['group']}/{each['version']}".removeprefix("/")
            schemas[api, each["kind"]] = {"$ref": f"#/definitions/{name}", "definitions": definitions}
    for path in folder.glob("*.yaml"):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            _make_strict(schema)
            schema["properties"]["metadata"] = _METADATA
            schema["definitions"] = definitions
            schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return schemas


def _make_strict(schema: Any) -> None:
    """Refuses fields that the schema does not list. Accepts either type where it has "int or string"."""
    if not isinstance(schema, dict):
        return
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for each in (*schema.get("properties", {}).values(), schema.get("items")):
        _make_strict(each)
    _make_strict(schema.get("additionalProperties"))
