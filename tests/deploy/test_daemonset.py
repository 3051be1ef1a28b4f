"""What the DaemonSet gives the agent is what it needs, and its files are what the agent reads. No cluster, no helm.

tests/deploy/manifests has what takes helm and kustomize.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml

from cni.config import nodefile, policy, schema
from cni.ctl.__main__ import make_parser
from lab.assets import images
from tests.deploy.test_systemd import CAPABILITIES as SYSTEMDS
from tests.deploy.test_systemd import Host, use

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.wire import Lab

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy/kustomize/base"
CHART = ROOT / "deploy/helm/vmtap"
POD: dict[str, Any] = yaml.safe_load((BASE / "daemonset.yaml").read_text())["spec"]["template"]["spec"]
CLAIMS = {"dra", "node", "hook", "nri"}
"""Settings that are flags of the component dra, so that it composes with others."""
AGENT: dict[str, Any] = POD["containers"][0]
CAPABILITIES: list[str] = AGENT["securityContext"]["capabilities"]["add"]
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture
def host(lab: Lab, tmp_path: Path) -> Iterator[Host]:
    made = Host(lab, tmp_path)
    yield made
    made.close()


def test_the_capabilities_are_enough(host: Host, reference_plugins: Path) -> None:
    with host.agent(CAPABILITIES):
        assert use(host, reference_plugins, broker=False) == []
        assert host.plugin.leftovers() == []


@pytest.mark.parametrize("needless", CAPABILITIES)
def test_each_capability_is_needed(host: Host, reference_plugins: Path, needless: str) -> None:
    with host.agent([name for name in CAPABILITIES if name != needless]):
        assert use(host, reference_plugins, broker=False) != []


def test_the_broker_is_all_that_systemd_gives_more() -> None:
    assert {*CAPABILITIES, "SYS_PTRACE"} == set(SYSTEMDS)


def test_nothing_is_privileged() -> None:
    for container in (*POD["initContainers"], *POD["containers"]):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert "ALL" in context["capabilities"]["drop"]
        assert not context.get("privileged")
    assert "add" not in POD["initContainers"][0]["securityContext"]["capabilities"]
    assert not POD.get("hostPID")
    assert POD["automountServiceAccountToken"] is False


def test_each_folder_is_where_the_host_has_it() -> None:
    """What the agent tells the kubelet and the runtime are paths of the host."""
    paths = {each["name"]: each.get("hostPath", {}).get("path") for each in POD["volumes"]}
    for container in (*POD["initContainers"], *POD["containers"]):
        for mount in container["volumeMounts"]:
            if paths[mount["name"]]:
                assert mount["mountPath"] == paths[mount["name"]]


def test_the_installer_is_a_command_of_ours() -> None:
    command = POD["initContainers"][0]["command"]
    assert command[0] == "vmtapctl"
    make_parser().parse_args(command[1:])
    uninstall = list(yaml.safe_load_all((BASE.parent / "uninstall/daemonset.yaml").read_text()))[-1]
    command = uninstall["spec"]["template"]["spec"]["initContainers"][0]["command"]
    assert command[0] == "vmtapctl"
    make_parser().parse_args(command[1:])


def test_the_agent_understands_the_config_map() -> None:
    data = yaml.safe_load((BASE / "configmap.yaml").read_text())["data"]
    settings = nodefile.parse("agent.yaml", data["agent.yaml"].encode(), schema.load("agent"))
    # Where metrics are served, where everything lies, and what claims need, is the pod's.
    assert schema.load("agent")["properties"].keys() - settings.keys() == {
        "run",
        "policy",
        "metrics",
        *CLAIMS,
    }
    nodefile.parse("interfaces.yaml", data["interfaces.yaml"].encode(), schema.load("policy"))


def test_the_values_are_good_and_the_schema_knows_each() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.Draft7Validator(SCHEMA).validate(VALUES)

    def compare(values: dict[str, Any], rules: dict[str, Any], path: str) -> None:
        assert values.keys() | {"global"} == rules["properties"].keys() | {"global"}, path
        for name, value in values.items():
            described = "properties" in rules["properties"][name]
            if isinstance(value, dict) and value and described and name != "resources":
                compare(value, rules["properties"][name], f"{path}.{name}")

    compare(VALUES, SCHEMA, "values")


def test_the_values_schema_knows_the_policys_words() -> None:
    """What the agent takes, helm must not refuse, and the other way round."""
    ours = schema.load("policy")["properties"]["interfaces"]["items"]["properties"]
    charts = SCHEMA["properties"]["interfaces"]["items"]["properties"]
    assert ours.keys() == charts.keys()
    assert ours["modes"]["items"]["enum"] == charts["modes"]["items"]["enum"]
    assert ours["type"]["enum"] == charts["type"]["enum"]
    capacity = SCHEMA["definitions"]["capacity"]
    assert (ours["capacity"]["minimum"], ours["capacity"]["maximum"]) == (
        capacity["minimum"],
        capacity["maximum"],
    )
    port = SCHEMA["definitions"]["port"]["properties"]
    assert port.keys() == ours["port"]["properties"].keys()
    assert port["rate"]["properties"].keys() == ours["port"]["properties"]["rate"]["properties"].keys()
    assert set(policy.MODES) <= set(charts["modes"]["items"]["enum"])


def test_one_version_everywhere() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)
    for path in (BASE.parent).rglob("kustomization.yaml"):
        for image in yaml.safe_load(path.read_text()).get("images", ()):
            assert f"{image['newName']}:{image['newTag']}" == images.NAMES["agent"], path
    assert f"{VALUES['image']['repository']}:{VERSION}" == images.NAMES["agent"]


def test_the_chart_has_no_value_that_nobody_reads() -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    read = set(re.findall(r"\.Values\.([A-Za-z.]+)", templates))

    def leaves(values: dict[str, Any], path: str) -> Iterator[str]:
        for name, value in values.items():
            here = f"{path}{name}"
            if here in read or not isinstance(value, dict):
                yield here
            else:
                yield from leaves(value, f"{here}.")

    assert {leaf for leaf in leaves(VALUES, "") if leaf not in read} == set()
