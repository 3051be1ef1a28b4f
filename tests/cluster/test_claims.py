"""Resource claims under a real API server, scheduler and kubelet: what is offered, prepared, refused and left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni.config.claim import DRIVER, NETWORKS
from cni.state.claims import Claim, Claims
from lab.kubernetes.client import KUBECTL_PAUSE
from lab.kubernetes.cluster import NODE
from lab.process import LabError, wait_for
from lab.wire import NIC
from tests.cluster.conftest import CAPACITY, NAMESPACE, RUN, pod
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.kubernetes.cluster import Cluster
    from tests.cluster.conftest import Release

EXAMPLES = Path(__file__).parents[2] / "deploy/examples/dra"
GROUP = "resource.k8s.io/v1"
REGISTRY = "/var/lib/kubelet/plugins_registry"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:vmtap"


def device_class(name: str, *expressions: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of the driver's devices for which each CEL expression is true; `mine` stands for its attributes."""
    mine = f'device.attributes["{DRIVER}"]'
    texts = [f'device.driver == "{DRIVER}"', *(each.replace("mine", mine) for each in expressions)]
    config = [{"opaque": {"driver": DRIVER, "parameters": parameters}}] if parameters else []
    spec = {"selectors": [{"cel": {"expression": each}} for each in texts], "config": config}
    return {"apiVersion": GROUP, "kind": "DeviceClass", "metadata": {"name": name}, "spec": spec}


def template(name: str, class_name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """A ResourceClaimTemplate with one request, called nic."""
    opaque = (
        [{"requests": ["nic"], "opaque": {"driver": DRIVER, "parameters": parameters}}] if parameters else []
    )
    devices = {"requests": [{"name": "nic", "exactly": {"deviceClassName": class_name}}], "config": opaque}
    spec = {"spec": {"devices": devices}}
    return {"apiVersion": GROUP, "kind": "ResourceClaimTemplate", "metadata": {"name": name}, "spec": spec}


def claiming(name: str, template_name: str) -> dict[str, Any]:
    """A pod whose container gets the device of a claim that is made of the template."""
    document = pod(name)
    document["spec"]["resourceClaims"] = [{"name": "net", "resourceClaimTemplateName": template_name}]
    [container] = document["spec"]["containers"]
    container["resources"] = {"claims": [{"name": "net"}]}
    return document


class Dra:
    """The release with dra, and what claims leave on the node."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.cluster: Cluster = release.cluster
        self.claims = Claims(self.cluster.machine.path(RUN))

    def slices(self) -> list[dict[str, Any]]:
        found = self.cluster.get("resourceslices", f"--field-selector=spec.driver={DRIVER}")["items"]
        return sorted(found, key=lambda each: str(each["metadata"]["name"]))

    def devices(self) -> dict[str, dict[str, Any]]:
        """Name → the values of the attributes."""
        return {
            each["name"]: {key: next(iter(value.values())) for key, value in each["attributes"].items()}
            for of in self.slices()
            for each in of["spec"].get("devices") or ()
        }

    def wait(self, wanted: Callable[[], object], what: str) -> None:
        wait_for(wanted, lambda: f"{what}\n{self.cluster.story()}\n{self.log()}", pause=KUBECTL_PAUSE)

    def log(self) -> str:
        return self.release.kubectl("logs", "daemonset/vmtap", "-c", "agent", "--tail=40", check=False)

    def wait_published(self, number: int) -> None:
        self.wait(lambda: len(self.devices()) == number, f"there are not {number} devices")

    def events(self, name: str) -> str:
        events = self.cluster.get("events", f"--field-selector=involvedObject.name={name}")["items"]
        return "\n".join(each["message"] for each in events)

    def wait_event(self, name: str, words: str) -> None:
        self.wait(lambda: words in self.events(name), f"no event of {name} has: {words}")

    def wait_prepared(self, name: str) -> Claim:
        self.wait(lambda: self._prepared(name), f"no claim of {name} is prepared")
        [found] = self._prepared(name)
        return found

    def _prepared(self, name: str) -> list[Claim]:
        # The spec is written last. Not /var/run: that is a link, which leads to the host here.
        cdi = self.cluster.machine.path("/run/cdi")
        found = [each for each in self.claims.all() if each.pod_name == name]
        return [each for each in found if (cdi / f"vmtap-claim-{each.uid}.json").exists()]

    def files(self) -> list[str]:
        """What a claim may leave on the node."""
        folders = (RUN / "claims", RUN / "metadata", RUN / "ifindex", RUN / "attachments", "/run/cdi")
        paths = (path for folder in folders for path in self.cluster.machine.path(folder).glob("**/*"))
        return sorted(str(path) for path in paths if not path.is_dir())

    def delete(self, *names: str) -> None:
        self.cluster.kubectl("delete", "pod", *names, f"--timeout={LIMIT}s")


@pytest.fixture(scope="module")
def with_dra(release: Release) -> Iterator[Dra]:
    release.install(dra={"enabled": True})
    made = Dra(release)
    made.cluster.apply(device_class("any", 'mine.interface == "dataplane"'))
    yield made
    made.cluster.kubectl("delete", "deviceclass", "--all")
    release.install(dra={"enabled": False})


@pytest.fixture
def dra(with_dra: Dra) -> Iterator[Dra]:
    with_dra.wait_published(CAPACITY + 1)
    before = with_dra.files()
    yield with_dra
    with_dra.cluster.kubectl("delete", "pod", "--all", f"--timeout={LIMIT}s")
    with_dra.cluster.kubectl(
        "delete", "resourceclaimtemplates,resourceclaims", "--all", f"--timeout={LIMIT}s"
    )
    with_dra.wait(lambda: with_dra.files() == before, f"not all of it is gone: {with_dra.files()}")


def test_the_policy_is_in_slices_that_are_the_nodes(dra: Dra) -> None:
    [only] = dra.slices()
    spec, [owner] = only["spec"], only["metadata"]["ownerReferences"]
    assert (spec["nodeName"], spec["pool"]["name"], spec["pool"]["resourceSliceCount"]) == (NODE, NODE, 1)
    assert (owner["kind"], owner["uid"]) == ("Node", dra.cluster.get("node", NODE)["metadata"]["uid"])
    devices = dra.devices()
    assert {name.rpartition("-")[0] for name in devices} == {"dataplane", "narrow"}
    first = devices["dataplane-0"]
    assert (first["source"], first["type"], first["mtu"]) == (NIC, "ethernet", 1500)
    assert first["bridge"] is first["vepa"] is first["pepa"] is first["carrier"] is True


def test_a_server_without_shared_devices_gets_single_ones(dra: Dra) -> None:
    """The API server of 1.34 drops the field, which a dry run shows; nothing of that is stored."""
    assert {name.rpartition("-")[2] for name in dra.devices()} == {str(each) for each in range(CAPACITY)}
    assert "drops fields" not in dra.log()


def test_slices_follow_the_policy(dra: Dra) -> None:
    values = dra.release.values["interfaces"]
    more = {"name": "one-more", "source": {"dev": NIC}, "modes": ["vepa"], "vlans": [7], "capacity": 200}
    dra.release.install(interfaces=[*values, more])
    dra.wait_published(CAPACITY + 201)
    assert len(dra.slices()) == 2
    assert {each["spec"]["pool"]["generation"] for each in dra.slices()} == {
        dra.slices()[0]["spec"]["pool"]["generation"]
    }
    found = dra.devices()["one-more-199"]
    assert (found["vlans"], found["bridge"], found["vepa"]) == (",7,", False, True)
    dra.release.install(interfaces=values)
    dra.wait_published(CAPACITY + 1)


def test_slices_follow_the_link(dra: Dra) -> None:
    """The devices stay, and show that they have no carrier."""
    for state_of_link, carrier in (("down", False), ("up", True)):
        dra.cluster.lab.node.ip(f"link set {NIC} {state_of_link}")
        dra.wait(
            lambda carrier=carrier: {each["carrier"] for each in dra.devices().values()} == {carrier},  # type: ignore[misc]
            f"the link is {state_of_link}, and the slices do not show it",
        )
    assert len(dra.devices()) == CAPACITY + 1


def test_a_claim_is_prepared_for_its_pod_and_leaves_nothing(dra: Dra) -> None:
    before = dra.files()
    dra.cluster.apply(
        template("nic", "any", {"ifname": "net1", "mode": "bridge", "mac": "02:00:00:00:0d:01"}),
        claiming("vm-a", "nic"),
    )
    claim = dra.wait_prepared("vm-a")
    known = dra.cluster.get("pod", "vm-a")["metadata"]
    assert (claim.pod_uid, claim.namespace) == (known["uid"], "default")
    [device] = claim.devices
    assert device.device.startswith("dataplane-")
    assert (device.pool, device.ifname, device.mac) == (NODE, "net1", "02:00:00:00:0d:01")
    assert device.config["interface"] == "dataplane"
    spec = json.loads(dra.cluster.machine.path(f"/run/cdi/vmtap-claim-{claim.uid}.json").read_text())
    [edits] = [each["containerEdits"] for each in spec["devices"]]
    assert edits["deviceNodes"][0]["path"] == f"/dev/tap{device.ifindex}"
    [mount] = edits["mounts"]
    assert "/resourceclaimtemplates/net/nic/" in mount["containerPath"]
    metadata = json.loads(dra.cluster.machine.path(mount["hostPath"]).read_text())
    attributes = metadata["requests"][0]["devices"][0]["attributes"]
    assert attributes["interface"] == {"string": "dataplane"}
    dra.delete("vm-a")
    dra.wait(lambda: dra.files() == before, "something of the claim is left")


def test_selectors(dra: Dra) -> None:
    dra.cluster.apply(
        device_class(
            "narrow", 'mine.interface == "narrow"', "mine.carrier && mine.vepa", parameters={"mode": "vepa"}
        ),
        device_class("fast", "mine.speed > 1000000"),
        template("narrow", "narrow"),
        template("fast", "fast"),
        claiming("chosen", "narrow"),
        claiming("nowhere", "fast"),
    )
    [device] = dra.wait_prepared("chosen").devices
    assert (device.device, device.config["mode"]) == ("narrow-0", "vepa")
    dra.wait_event("nowhere", "cannot allocate all claims")
    dra.cluster.apply(claiming("second", "narrow"))  # the interface is full
    dra.wait_event("second", "cannot allocate all claims")
    dra.delete("chosen")
    dra.wait_prepared("second")


def unscheduled(dra: Dra, name: str) -> str:
    """The scheduler's message about a pod that it has placed nowhere; "" if there is none."""
    conditions = dra.cluster.get("pod", name)["status"].get("conditions") or []
    found = [each for each in conditions if (each["type"], each["status"]) == ("PodScheduled", "False")]
    return str(found[0]["message"]) if found else ""


def test_selectors_by_mode_carrier_and_numa_node(dra: Dra) -> None:
    """A selector that matches nothing leaves the pod Pending, and one that matches later places it."""
    dra.cluster.apply(
        device_class("here", "mine.bridge && mine.carrier && mine.numaNode < 1"),
        device_class("elsewhere", "mine.bridge && mine.numaNode == 7"),
        *(template(name, name) for name in ("here", "elsewhere")),
        claiming("placed", "here"),
        claiming("pending", "elsewhere"),
    )
    dra.wait_prepared("placed")
    dra.wait(lambda: "cannot allocate all claims" in unscheduled(dra, "pending"), "it is not Pending")
    dra.cluster.lab.node.ip(f"link set {NIC} down")
    try:
        dra.wait(lambda: not any(each["carrier"] for each in dra.devices().values()), "there is a carrier")
        dra.cluster.apply(claiming("waits", "here"))
        dra.wait(lambda: "cannot allocate all claims" in unscheduled(dra, "waits"), "it is not Pending")
    finally:
        dra.cluster.lab.node.ip(f"link set {NIC} up")
    dra.wait_prepared("waits")
    assert unscheduled(dra, "pending")


def test_one_capacity_for_claims_and_the_device_plugin(dra: Dra) -> None:
    """Of the interface narrow, which has one device."""
    dra.cluster.apply(
        device_class("narrow", 'mine.interface == "narrow"'),
        template("narrow", "narrow"),
        pod("by-plugin", "narrow"),
    )
    ready(dra, "by-plugin")
    dra.wait_published(CAPACITY)
    dra.cluster.apply(claiming("by-claim", "narrow"))
    dra.wait_event("by-claim", "cannot allocate all claims")
    dra.delete("by-plugin")
    ready(dra, "by-claim")
    dra.release.wait_resource("narrow", 0)
    dra.cluster.apply(pod("by-plugin", "narrow"))
    dra.wait_event("by-plugin", "Insufficient")
    dra.delete("by-claim")
    ready(dra, "by-plugin")


def test_the_examples(dra: Dra) -> None:
    for name in ("deviceclass", "claimtemplate", "vm-pod"):
        dra.cluster.kubectl("apply", "-f", "-", stdin=(EXAMPLES / f"{name}.yaml").read_text())
    [device] = dra.wait_prepared("vm-claim").devices
    assert device.ifname == "net1"
    assert (device.config["interface"], device.config["mode"]) == ("dataplane", "bridge")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            {"mtuu": 9000},
            'parameters of the claim: mtuu: unknown key, its value is 9000; did you mean "mtu"?',
        ),
        ({"interface": "narrow"}, "the device that is allocated has it"),
        (
            {"ipam": {"type": "host-local"}},
            "a claim may name an IPAM plugin only if ipamTypes of the policy lists it",
        ),
        ({"mode": "pepa", "queues": 0}, "queues: 0 is not allowed"),
    ],
    ids=["misspelt", "foreign", "delegate", "value"],
)
def test_a_wrong_parameter_is_an_event_of_the_pod(dra: Dra, parameters: dict[str, Any], words: str) -> None:
    before = dra.files()
    dra.cluster.apply(template("wrong", "any", parameters), claiming("vm-w", "wrong"))
    dra.wait_event("vm-w", words)
    assert dra.files() == before
    dra.delete("vm-w")


def test_a_kubelet_that_starts_again_and_slices_that_are_wiped(dra: Dra) -> None:
    dra.cluster.apply(template("nic", "any"), claiming("stays", "nic"))
    claim = dra.wait_prepared("stays")
    uids = {each["metadata"]["uid"] for each in dra.slices()}
    dra.cluster.kubelet.kill()
    dra.cluster.kubelet.start()
    dra.cluster.wait_node()
    dra.wait(
        lambda: (
            len(dra.devices()) == CAPACITY + 1
            and not {each["metadata"]["uid"] for each in dra.slices()} & uids
        ),
        "the slices were not published again",
    )
    assert [each.uid for each in dra.claims.all()] == [claim.uid]
    dra.delete("stays")  # Unprepare, by a kubelet that has not prepared it


def test_an_agent_that_starts_again_knows_its_claims(dra: Dra) -> None:
    dra.cluster.apply(template("nic", "any"), claiming("stays", "nic"))
    claim = dra.wait_prepared("stays")
    dra.release.restart()
    dra.wait_published(CAPACITY + 1)
    assert len([*dra.cluster.machine.path(REGISTRY).glob(f"{DRIVER}-*")]) == 1
    assert [each.uid for each in dra.claims.all()] == [claim.uid]
    dra.delete("stays")


def test_an_agent_writes_the_slices_of_its_own_node_only(dra: Dra) -> None:
    """The admission policy, for the agent's account, with a token of no node, and the rights that it does not have."""
    pool = {"name": "other", "generation": 1, "resourceSliceCount": 1}
    foreign = {
        "apiVersion": GROUP,
        "kind": "ResourceSlice",
        "metadata": {"name": "foreign"},
        "spec": {"driver": DRIVER, "nodeName": "other", "pool": pool, "devices": []},
    }
    with pytest.raises(LabError, match="writes the ResourceSlices of its own node only"):
        dra.cluster.kubectl("create", "-f", "-", f"--as={ACCOUNT}", stdin=json.dumps(foreign))
    for words in (
        ["list", "resourceclaims"],
        ["get", "secrets"],
        ["list", "pods"],
        ["update", "resourceclaims"],
    ):
        assert dra.cluster.kubectl("auth", "can-i", *words, f"--as={ACCOUNT}", check=False).strip() == "no"


# Pods that run

INSIDE = "/var/run/kubernetes.io/dra-device-attributes/resourceclaimtemplates/net/nic"


def inside(dra: Dra, name: str, script: str) -> str:
    """The output of a script in the pod."""
    return dra.cluster.kubectl("exec", name, "--", "/bin/busybox", "sh", "-euc", script).strip()


def ready(dra: Dra, name: str) -> None:
    try:
        dra.cluster.wait(f"pod/{name}", "condition=Ready")
    except LabError as error:
        raise LabError(f"{error}\n{dra.log()}") from error


def check_device(dra: Dra, name: str) -> str:
    """major:minor of the pod's device node, which is that of its own link."""
    major, minor = (
        int(word, 16) for word in inside(dra, name, "busybox stat -c '0x%t 0x%T' /dev/tap*").split()
    )
    assert inside(dra, name, "busybox cat /sys/class/net/net1/macvtap/tap*/dev") == f"{major}:{minor}"
    return f"{major}:{minor}"


def state(dra: Dra, name: str) -> dict[str, Any]:
    """The pod's only container."""
    status = dra.cluster.get("pod", name)["status"]
    [found] = status.get("containerStatuses") or [{}]
    return dict(found)


@pytest.fixture
def runs(dra: Dra) -> str:
    """A pod that runs, with the link net1 of its claim."""
    dra.cluster.apply(template("nic", "any", {"ifname": "net1"}), claiming("runs", "nic"))
    ready(dra, "runs")
    check_device(dra, "runs")
    return "runs"


def away(dra: Dra) -> None:
    """Ends the agent, until back()."""
    dra.release.install(agent={"nodeSelector": {"kubernetes.io/os": "none"}})
    dra.wait(
        lambda: "vmtapd" not in " ".join(dra.cluster.machine.processes().values()), "the agent has not ended"
    )


def back(dra: Dra) -> None:
    dra.release.install(agent={})
    dra.wait_published(CAPACITY + 1)


def test_a_pod_has_its_claims_device(dra: Dra, runs: str) -> None:
    [claim] = dra.claims.all()
    [record] = dra.release.records()
    assert record["container_id"] == claim.uid
    network = {"interfaceName": "net1", "hardwareAddress": record["mac"]}
    metadata = json.loads(inside(dra, runs, f"busybox cat {INSIDE}/{DRIVER}-metadata.json"))
    assert metadata["requests"][0]["devices"][0]["networkData"] == network
    dra.wait(
        lambda: dra.cluster.get("resourceclaim", claim.name)["status"].get("devices"),
        "the claim's status is not reported",
    )
    [device] = dra.cluster.get("resourceclaim", claim.name)["status"]["devices"]
    assert device["networkData"] == network


def test_the_mac_stays_when_the_pod_is_made_again(dra: Dra, runs: str) -> None:
    [before] = dra.release.records()
    dra.delete(runs)
    dra.cluster.apply(claiming(runs, "nic"))
    ready(dra, runs)
    [after] = dra.release.records()
    assert after["container_id"] != before["container_id"]
    assert after["mac"] == before["mac"]


def test_a_mac_of_the_pods_annotation(dra: Dra) -> None:
    """By containerd's NRI."""
    document = claiming("asks", "nic")
    macs = [{"claimName": "net", "requestName": "nic", "macs": ["02:00:00:00:0d:02"]}]
    document["metadata"]["annotations"][NETWORKS] = json.dumps(macs)
    dra.cluster.apply(template("nic", "any", {"ifname": "net1"}), document)
    ready(dra, "asks")
    assert [record["mac"] for record in dra.release.records()] == ["02:00:00:00:0d:02"]
    assert inside(dra, "asks", "busybox cat /sys/class/net/net1/address") == "02:00:00:00:0d:02"


def test_a_container_and_the_runtime_start_again(dra: Dra, runs: str) -> None:
    device = check_device(dra, runs)
    dra.cluster.kubelet.kill()
    dra.cluster.containerd.kill()
    dra.cluster.containerd.start()
    dra.cluster.kubelet.start()
    echo = ["exec", runs, "--", "/bin/busybox", "echo", "up"]
    dra.wait(lambda: "up" in dra.cluster.kubectl(*echo, check=False), "the kubelet does not work again")
    dra.wait_published(CAPACITY + 1)
    assert state(dra, runs)["restartCount"] == 0
    dra.cluster.kubectl("exec", runs, "--", "/bin/busybox", "sh", "-euc", "kill -TERM 1", check=False)
    dra.wait(lambda: state(dra, runs).get("restartCount") == 1, "the container did not start again")
    ready(dra, runs)
    assert check_device(dra, runs) == device


def test_a_sandbox_is_made_again_while_the_agent_is_away(dra: Dra, runs: str) -> None:
    """A pod that runs without its link, or with another pod's device, never happens."""
    away(dra)
    [first] = [pod for pod, alive in dra.cluster.cri.pods().items() if alive and _is(dra, pod, runs)]
    dra.cluster.cri.stop_pod(first)
    dra.wait(lambda: any(word in dra.events(runs) for word in ("Failed", "failed")), "nothing failed")
    assert not state(dra, runs).get("ready")
    assert "running" not in state(dra, runs).get("state", {})
    back(dra)
    ready(dra, runs)
    check_device(dra, runs)


def _is(dra: Dra, sandbox: str, name: str) -> bool:
    logs = dra.cluster.run(["ctr", "containers", "info", sandbox])
    return f'"io.kubernetes.cri.sandbox-name": "{name}"' in logs


def test_a_pod_is_deleted_while_the_agent_is_away(dra: Dra, runs: str) -> None:
    away(dra)
    dra.cluster.kubectl("delete", "pod", runs, "--wait=false")
    back(dra)
    dra.cluster.kubectl("wait", f"pod/{runs}", "--for=delete", f"--timeout={LIMIT}s")


def test_the_agent_is_killed_while_a_claim_is_prepared_and_while_it_ends(dra: Dra) -> None:
    """The kubelet starts it again."""
    dra.cluster.apply(template("nic", "any", {"ifname": "net1"}), claiming("runs", "nic"))
    until(dra.claims.all, "no claim is prepared")
    kill(dra)
    ready(dra, "runs")
    check_device(dra, "runs")
    dra.cluster.kubectl("delete", "pod", "runs", "--wait=false")
    until(dra.release.records, "the sandbox did not end", lambda found: not found)
    kill(dra)
    dra.cluster.kubectl("wait", "pod/runs", "--for=delete", f"--timeout={LIMIT}s")


def kill(dra: Dra) -> None:
    """SIGKILL, for the agent."""
    [pid] = [pid for pid, words in dra.cluster.machine.processes().items() if "bin/vmtapd" in words]
    dra.cluster.run(["kill", "-KILL", str(pid)])


def test_two_pods_do_not_share_a_claim(dra: Dra) -> None:
    spec = template("x", "any", {"ifname": "net1"})["spec"]["spec"]
    claim = {"apiVersion": GROUP, "kind": "ResourceClaim", "metadata": {"name": "one"}, "spec": spec}
    pods = {name: claiming(name, "unused") for name in ("first", "second")}
    for document in pods.values():
        document["spec"]["resourceClaims"] = [{"name": "net", "resourceClaimName": "one"}]
    dra.cluster.apply(claim, pods["first"])
    ready(dra, "first")
    device = check_device(dra, "first")
    dra.cluster.apply(pods["second"])
    dra.wait_event("second", "is prepared for pod default/first")
    assert "running" not in state(dra, "second").get("state", {})
    assert check_device(dra, "first") == device
    assert len(dra.release.records()) == 1
