"""The chart's alerts and dashboard: the alerts by promtool, and both by a real Prometheus that scrapes a real agent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from lab.frames import packet_socket
from lab.kubernetes.kubelet import Kubelet
from lab.wire import NIC, Lab
from tests.agent.conftest import Agent
from tests.migration.conftest import VM, arp, rarp
from tests.runner import config
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Iterator

FILES = Path(__file__).parents[2] / "deploy/helm/vmtap/files"
TESTS = Path(__file__).with_name("alerts.test.yaml")
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((FILES / "dashboard.json").read_text())
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
NODE = "worker-1"
METRIC = re.compile(r"\b(?:vmtap|process)_\w+|\bup\b")


def promtool(*words: str | Path) -> None:
    if not shutil.which("promtool"):
        pytest.fail("promtool is missing: lab/setup test installs it")
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_are_good_rules() -> None:
    promtool("check", "rules", FILES / "alerts.yaml")
    for rule in RULES:
        assert {"summary", "description"} == rule["annotations"].keys(), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_each_alert_fires_when_it_should(tmp_path: Path) -> None:
    shutil.copy(FILES / "alerts.yaml", tmp_path)
    shutil.copy(TESTS, tmp_path)
    promtool("test", "rules", tmp_path / TESTS.name)
    fired = {
        test["alertname"]
        for group in yaml.safe_load(TESTS.read_text())["tests"]
        for test in group["alert_rule_test"]
        if test["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in RULES}


@dataclass
class Prometheus:
    """Debian's, in the node's namespace, with the labels that the PodMonitor would give."""

    lab: Lab
    port: int

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"

        def get() -> Any:
            try:
                with urllib.request.urlopen(url, timeout=LIMIT) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:  # not ready yet: an answer too, with a socket to close
                with error:
                    raise ConnectionError(f"{url}: {error}") from None

        document = self.lab.node.call(get)
        assert document["status"] == "success"
        return document["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples that it answers with now."""
        result: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return result

    def wait(self, expression: str) -> None:
        """Until it answers with any.

        A sample may be gone for a moment: a scrape that takes longer than a second counts as a failed one, after which
        Prometheus knows nothing of the agent but that it is not up.
        """
        until(lambda: self.query(expression), f"no sample of {expression}")


@pytest.fixture(scope="module")
def wired() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def prometheus(wired: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen an agent that did everything there is a number for."""
    if not shutil.which("prometheus"):
        pytest.fail("prometheus is missing: lab/setup test installs it")
    lab, folder = wired, tmp_path_factory.mktemp("prometheus")
    agent = Agent(lab.node, folder / "run", folder / "interfaces.yaml")
    agent.policy.write_text(
        json.dumps(
            {
                "interfaces": [
                    {
                        "name": "data",
                        "source": {"dev": NIC},
                        "capacity": 4,
                        "port": {"macSpoofCheck": True},
                    }
                ]
            }
        )
    )
    with tempfile.TemporaryDirectory() as short, Kubelet(f"{short}/device-plugins") as kubelet:
        agent.flags = ("--device-plugin", "--kubelet", str(kubelet.folder), "--metrics", "127.0.0.1:0")
        agent.flags += ("--reconcile-seconds", "1")
        # Without a runtime, an API server and a kubelet that registers the driver.
        agent.flags += ("--dra", "--node", NODE, "--nri", f"{folder}/nri.sock", "--cdi", f"{folder}/cdi")
        agent.env = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1"}
        agent.start()
        agent.said("registered with the kubelet")
        (folder / "prometheus.yml").write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(FILES / "alerts.yaml")],
                    "scrape_configs": [
                        {
                            "job_name": "vmtap",
                            "static_configs": [
                                {"targets": [f"127.0.0.1:{agent.port}"], "labels": {"node": NODE}}
                            ],
                        }
                    ],
                }
            )
        )
        argv = [
            *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
            *("--web.listen-address=127.0.0.1:9090", "--log.level=warn"),
        ]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(lab.node.argv(argv), stdout=log, stderr=log)
        try:
            found = Prometheus(lab, 9090)
            work(lab, agent, kubelet, found)
            yield found
        finally:
            process.terminate()
            process.wait(LIMIT)
            agent.end()


def work(lab: Lab, agent: Agent, kubelet: Kubelet, prometheus: Prometheus) -> None:
    """Let there be a number of each kind, and two scrapes of it, which a rate needs."""
    shim = agent.shim()

    def once() -> None:
        pod, orphan = lab.pod(), lab.pod()
        shim("ADD", config(interface="data"), netns=pod).ok()
        kubelet.allocate("macvtap.network.kubevirt.io/data", ["dataMvp0"])
        shim("ADD", config(interface="nothing"), netns=pod, ifname="net2").error(7)
        shim("ADD", config(interface="data"), netns=orphan, container="orphan").ok()
        orphan.close()
        shim("DEL", config(interface="data"), netns=pod).ok()

    once()
    stays = lab.pod()
    shim("ADD", config(interface="data", mac=VM), netns=stays, container="stays").ok()

    def scraped() -> bool:
        with suppress(OSError):
            return bool(prometheus.query("vmtap_reconcile_ended_total"))
        return False

    until(scraped, "Prometheus has scraped nothing")
    once()
    prometheus.wait("increase(vmtap_reconcile_ended_total[1m]) > 0")
    with packet_socket(stays, "net1") as guest, packet_socket(lab.peer, "eth0") as wire:

        def moves() -> list[dict[str, Any]]:
            """The VM is here, and announced from elsewhere."""
            guest.send(arp(VM))
            wire.send(rarp(VM))
            return prometheus.query('increase(vmtap_handover_silence_seconds_count{vm="left"}[1m]) > 0')

        until(moves, "no VM that has left is counted")


@pytest.mark.parametrize("name", [rule["alert"] for rule in RULES])
def test_each_metric_of_an_alert_is_there(prometheus: Prometheus, name: str) -> None:
    [expression] = [rule["expr"] for rule in RULES if rule["alert"] == name]
    for metric in set(METRIC.findall(expression)):
        prometheus.wait(metric)
    prometheus.query(expression)  # it is understood


def test_what_is_in_order_alerts_nobody(prometheus: Prometheus) -> None:
    """But of the attachments that were let fail here, and of the API server and the kubelet that there are not."""
    groups = prometheus.ask("rules")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert rules.keys() == {rule["alert"] for rule in RULES}
    until(
        lambda: [rule for rule in prometheus.ask("rules")["groups"][0]["rules"] if rule["health"] != "ok"],
        "not every rule is in order",
        lambda ailing: not ailing,
    )

    def alerts() -> set[str]:
        return {alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"]}

    expected = {"VmtapAttachmentsFailing", "VmtapDriverNotRegistered", "VmtapSlicesNotPublished"}
    until(alerts, "there are other alerts", lambda names: names <= expected)


@pytest.mark.parametrize("name", QUERIES)
def test_each_query_of_the_dashboard_is_answered(prometheus: Prometheus, name: str) -> None:
    expression = QUERIES[name].replace("$__rate_interval", "1m").replace("$node", ".*")
    assert "$" not in expression
    prometheus.wait(expression)


def test_the_dashboards_variable(prometheus: Prometheus) -> None:
    [variable] = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "node"]
    assert variable["query"]["query"] == "label_values(vmtap_policy_valid, node)"
    assert prometheus.ask("label/node/values", **{"match[]": "vmtap_policy_valid"}) == [NODE]


def test_the_dashboard_is_laid_out() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
