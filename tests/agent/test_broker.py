"""The fd broker as pods see it: a real agent, real attachments, and processes that have no privilege at all."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from cni import spec
from cni.agent.admission import PER_POD
from cni.kernel import netns, tapdev
from cni.state.record import Record
from cni.state.store import Store, in_netns
from lab.guest import Guest, Image, Nic
from tests.agent import inpod
from tests.runner import BIN, config
from tests.waiting import LIMIT, until, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.wire import Lab, Netns
    from tests.agent.conftest import Agent

ADDRESS, PEER = "10.77.0.5/24", "10.77.0.254"

ASK = """
import json, os, sys
from cni.errors import CniError
from cni.launcher import broker_client
usual = {"ifnames": [], "queues": None, "shared": False, "open": True}
for line in sys.stdin:
    asked = json.loads(line)
    if asked.pop("nothing", False):
        print("null", flush=True)
        continue
    try:
        given = broker_client.ask(sys.argv[1], **usual | asked)
    except CniError as error:
        print(json.dumps({"code": error.code, "msg": str(error)}), flush=True)
    else:
        print(json.dumps([vars(each) | {"fds": len(fds)} for each, fds in given]), flush=True)
"""
"""A launcher that never becomes QEMU: a request a line; asked for nothing, it says only that it has started."""

SAY = """
import json, socket, sys
for line in sys.stdin:
    asked = json.loads(line)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    lines = connection.makefile()
    if asked.get("early"):
        connection.sendall(b"{}\\n")
        print("true", flush=True)
    else:
        lines.readline()
        connection.sendall(asked["say"].encode() * asked.get("times", 1))
        if asked.get("end"):
            connection.shutdown(socket.SHUT_WR)
    print(lines.readline(), end="", flush=True)
"""
"""A client that says what no launcher of ours would."""


class Client:
    """A process in a pod that asks the broker."""

    def __init__(self, agent: Agent, pod: Netns, code: str, under: tuple[str, ...] = ()) -> None:
        program = [sys.executable, "-c", code, f"{inpod.MOUNTED}/broker.sock"]
        self.process = subprocess.Popen(
            [*under, *inpod.argv(pod.path, agent.run / "launcher", program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=inpod.ROOT,
            env={**os.environ, "PYTHONPATH": str(inpod.ROOT)},
        )

    def ask(self, **fields: Any) -> Any:
        """The answer: a list of attachments with the number of their fds, or an error."""
        return self.tell(fields)()

    def tell(self, fields: dict[str, Any]) -> Callable[[], Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()
        return self.answer

    def answer(self) -> Any:
        assert self.process.stdout
        with watched(self.process):  # not select(2): two lines may have come at once
            line = self.process.stdout.readline()
        assert line, "no answer"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def attach(agent: Agent, pod: Netns, ifname: str = "net1", container: str = "c1", **fields: Any) -> str:
    """ADD, and the guest's MAC."""
    conf = config(**({"source": "eth1", "mode": "bridge"} | fields))
    answer = agent.shim()("ADD", conf, netns=pod, ifname=ifname, container=container).ok()
    return next(str(each["mac"]) for each in answer["interfaces"] if each["name"] == ifname)


def detach(agent: Agent, pod: Netns, ifname: str = "net1", container: str = "c1") -> None:
    agent.shim()(
        "DEL", config(source="eth1", mode="bridge"), netns=pod, ifname=ifname, container=container
    ).ok()


def held(agent: Agent) -> list[Path]:
    """Without a file that is being written in the place of one of them."""
    return [path for path in (agent.run / "holders").iterdir() if path.suffix != ".new"]


def asking(agent: Agent, pod: Netns) -> Client:
    return Client(agent, pod, ASK)


def once(agent: Agent, pod: Netns) -> Any:
    with asking(agent, pod) as client:
        return client.ask()


def test_a_pod_gets_its_own_attachments_and_their_description(agent: Agent, lab: Lab) -> None:
    pod, other = lab.pod(), lab.pod("other")
    macs = [
        attach(agent, pod, "net2", source="br0", queues=3),
        attach(agent, pod, "net1", queues=2, mtu=1400),
    ]
    attach(agent, other, "net1", container="c2")
    with asking(agent, pod) as client:
        first, second = client.ask()
        assert first == {
            "network": "wire",
            "ifname": "net1",
            "device": "macvtap",
            "mode": "bridge",
            "mac": macs[1],
            "mtu": 1400,
            "queues": 2,
            "ips": [],
            "routes": [],
            "dns": None,
            "fds": 2,
        }
        assert (second["ifname"], second["device"], second["mac"], second["fds"]) == (
            "net2",
            "tap",
            macs[0],
            3,
        )
        assert len(held(agent)) == 2
        with asking(agent, other) as another:
            [only] = another.ask(queues=1)
            assert only["mac"] not in macs
            assert only["fds"] == 1
    until(lambda: not held(agent), "the holders are gone and their files are not")


def test_what_is_asked_for_is_what_is_given(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod, "net1", queues=2)
    attach(agent, pod, "net2", queues=4)
    with asking(agent, pod) as client:
        described = client.ask(open=False)
        assert [(each["queues"], each["fds"]) for each in described] == [(2, 0), (4, 0)]
        assert not held(agent)  # a description is no fd
        assert [each["fds"] for each in client.ask(ifnames=["net2"], queues=3)] == [3]
        assert [each["ifname"] for each in client.ask(ifnames=["net1"])] == ["net1"]


def refused(answer: Any, code: int, says: str) -> None:
    assert isinstance(answer, dict), answer
    assert (answer["code"], says in answer["msg"]) == (code, True), answer


def test_refused_a_pod_without_attachments(agent: Agent, lab: Lab) -> None:
    attach(agent, lab.pod())
    with asking(agent, lab.pod("empty")) as client:
        refused(client.ask(), spec.NO_ATTACHMENT, "no attachment in this network namespace")
    agent.end()
    [line] = [line for line in agent.log if line["msg"] == "launcher refused"]
    assert (line["uid"], line["code"]) == (107, spec.NO_ATTACHMENT)


def test_refused_a_namespace_that_the_launcher_makes_itself(agent: Agent, lab: Lab) -> None:
    """Anybody can have a namespace of its own, with links named as it likes."""
    attach(agent, lab.pod())
    made = f"""
import ctypes, os, subprocess
assert ctypes.CDLL(None).unshare({inpod.CLONE_NEWUSER | inpod.CLONE_NEWNET}) == 0
{ASK}"""
    with Client(agent, lab.pod("empty"), made) as client:
        refused(client.ask(), spec.NO_ATTACHMENT, "no attachment in this network namespace")


def test_refused_a_link_that_looks_like_another_pods(agent: Agent, lab: Lab) -> None:
    """Who is root in a namespace gives links the names and indexes that it likes."""
    attach(agent, lab.pod())
    [theirs] = Store(agent.run).records()
    forger = lab.pod("forger")
    forger.ip(f"link add name {theirs.ifname} index {theirs.ifindex} address {theirs.mac} type veth")
    assert forger.links()[theirs.ifname]["ifindex"] == theirs.ifindex
    with asking(agent, forger) as client:
        refused(client.ask(open=False), spec.NO_ATTACHMENT, "no attachment in this network namespace")


def test_refused_the_hosts_namespace(agent: Agent, lab: Lab) -> None:
    with asking(agent, lab.node) as client:
        refused(client.ask(), spec.INVALID_NETNS, "the broker is for pods")


def test_refused_more_queues_than_there_are(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod, queues=2)
    with asking(agent, pod) as client:
        refused(client.ask(queues=3), spec.INVALID_ENVIRONMENT, "net1 has 2")
        refused(client.ask(ifnames=["net2"]), spec.NO_ATTACHMENT, "there is net1")
        assert client.ask(queues=2)[0]["fds"] == 2


def test_refused_a_second_holder_while_the_first_lives(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod)
    with asking(agent, pod) as second:
        with asking(agent, pod) as first:
            assert first.ask()[0]["fds"] == 1
            refused(second.ask(), spec.DEVICE_BUSY, "held by a running process")
            refused(first.ask(), spec.DEVICE_BUSY, "held by a running process")  # more fds, more queues
            assert second.ask(shared=True)[0]["fds"] == 1
        refused(once(agent, pod), spec.DEVICE_BUSY, "held")  # the sharer lives
    assert isinstance(once(agent, pod), list)


def test_a_failure_holds_nothing(agent: Agent, lab: Lab) -> None:
    """A tap of one queue that is open elsewhere: the second attachment cannot be had, so neither is held."""
    pod = lab.pod()
    attach(agent, pod, "net1")
    attach(agent, pod, "net2", source="br0")
    here = netns.open_path(str(pod.path))
    try:
        [_, tap] = in_netns(agent.run, netns.identity(here))
        [fd] = tapdev.open_queues(here, tap, 1)
    finally:
        os.close(here)
    with asking(agent, pod) as client:
        refused(client.ask(), spec.DEVICE_BUSY, "net2 is in use")
        assert not held(agent)
        os.close(fd)
        assert len(client.ask()) == 2


def test_holders_outlive_the_agent(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod)
    with asking(agent, pod) as second:
        with asking(agent, pod) as first:
            first.ask()
            for number in (signal.SIGTERM, signal.SIGKILL):
                agent.end(number)
                agent.start()
                refused(second.ask(), spec.DEVICE_BUSY, "held")
            agent.end()
            refused(second.ask(), spec.TRY_AGAIN_LATER, "is vmtapd running")
            assert held(agent)
        agent.start()
        assert not held(agent)
        assert second.ask()[0]["fds"] == 1


def test_an_end_is_noticed_after_a_restart(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod)
    with asking(agent, pod) as first:
        first.ask()
        agent.end(signal.SIGKILL)
        agent.start()
        assert held(agent)
    until(lambda: not held(agent), "the holder is gone and its file is not")


def test_with_the_attachment_its_holders_are_forgotten(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod)
    with asking(agent, pod) as first, asking(agent, pod) as second:
        first.ask()
        detach(agent, pod)
        assert not held(agent)
        refused(second.ask(), spec.NO_ATTACHMENT, "no attachment")
        attach(agent, pod)  # the same attachment once more
        assert second.ask()[0]["fds"] == 1
        first.process.kill()
        first.process.wait()
        refused(once(agent, pod), spec.DEVICE_BUSY, "held")  # by the second
        assert len(held(agent)) == 1


def test_a_stale_record_hides_nothing(agent: Agent, lab: Lab) -> None:
    """A namespace that died without a DEL, whose inode this one has got: records of the same ifname on both sides."""
    pod = lab.pod()
    mac = attach(agent, pod, container="c5")
    store = Store(agent.run)
    [living] = store.records()
    for container in ("c1", "c9"):
        stale = Record(**vars(living) | {"container_id": container, "mac": "02:00:00:00:00:99"})
        index = store.reserve_ifindex(stale.id)
        store.save(Record(**vars(stale) | {"ifindex": index}))
    with asking(agent, pod) as client:
        [only] = client.ask()
        assert (only["mac"], only["fds"]) == (mac, 1)


@pytest.mark.parametrize(
    ("say", "says"),
    [
        ({"say": '{"netns": "/proc/1/ns/net"}\n'}, "'netns' is not a field"),
        ({"say": '{"queues": true}\n'}, "queues must be"),
        ({"say": '{"queues": 0}\n'}, "queues must be"),
        ({"say": '{"ifnames": ["net1", "net1"]}\n'}, "ifnames must be"),
        ({"say": '{"shared": 1}\n'}, "shared must be"),
        ({"say": "[]\n"}, "not a JSON object"),
        ({"say": "GET / HTTP/1.1\n"}, "not JSON"),
        ({"say": "[" * 60000 + "\n"}, "not JSON"),
        ({"say": "{}\n{}\n"}, "not JSON"),
        ({"say": "x" * 1024, "times": 65}, "longer than 65536"),
        ({"say": '{"open": fal', "end": True}, "ended before the request's line did"),
    ],
)
def test_refused_what_is_no_request(agent: Agent, lab: Lab, say: dict[str, Any], says: str) -> None:
    pod = lab.pod()
    attach(agent, pod)
    with Client(agent, pod, SAY) as client:
        answer = client.ask(**say)
        assert (answer["error"]["code"], says in answer["error"]["msg"]) == (6, True), answer
    assert once(agent, pod)[0]["fds"] == 1


def test_refused_what_was_said_before_the_greeting(agent: Agent, lab: Lab) -> None:
    """It may be from before the peer was looked at, so it proves nothing."""
    pod = lab.pod()
    attach(agent, pod)
    with Client(agent, pod, SAY) as client:
        with agent.stopped():
            assert client.ask(early=True) is True
        error = client.answer()["error"]
        refused(error, spec.DECODING_FAILURE, "sent data before the greeting")


def test_refused_a_connection_that_another_process_uses(agent: Agent, lab: Lab) -> None:
    """It would be the first process that is noted as holder, and the second that has the fds."""
    pod = lab.pod()
    attach(agent, pod)
    forked = """
import os, socket, sys
sys.stdin.readline()
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.recv(100)
if os.fork() == 0:
    connection.sendall(b"{}\\n")
    print(connection.recv(65536).decode(), end="", flush=True)
    os._exit(0)
os.wait()
"""
    with Client(agent, pod, forked) as client:
        answer = client.ask()["error"]
        refused(answer, spec.INVALID_NETNS, "must come from the process that connected")
    assert not held(agent)


HANG = """
import json, socket, sys
connections = []
for line in sys.stdin:
    for _ in range(int(json.loads(line)["number"])):
        connections.append(socket.socket(socket.AF_UNIX))
        connections[-1].connect(sys.argv[1])
    print(json.dumps([each.recv(4096).decode() for each in connections]), flush=True)
    print(json.dumps([each.recv(4096).decode() for each in connections[:-2]]), flush=True)
"""


def test_a_hung_launcher_delays_nobody(agent: Agent, lab: Lab) -> None:
    pod, other = lab.pod(), lab.pod("other")
    attach(agent, pod)
    attach(agent, other, container="c2")
    with Client(agent, pod, HANG) as hung, asking(agent, other) as client, asking(agent, pod) as same:
        # Once they have started, what follows is over before the hung ones' five seconds are.
        client.ask(nothing=True)
        same.ask(nothing=True)
        greetings = hung.ask(number=PER_POD + 2)
        assert [json.loads(said).get("broker") for said in greetings] == [1] * PER_POD + [None] * 2
        assert json.loads(greetings[-1])["error"]["code"] == spec.TRY_AGAIN_LATER
        refused(same.ask(), spec.TRY_AGAIN_LATER, f"{PER_POD} requests of this pod")
        assert client.ask()[0]["fds"] == 1
        assert hung.process.stdout
        assert not select.select([hung.process.stdout], [], [], 0)[0], "it had to wait for them"
        ends = hung.answer()
        assert all("not finished" in said for said in ends), ends
        until(lambda: isinstance(same.ask(open=False), list), "they are told so, and counted still")
        assert same.ask()[0]["fds"] == 1


REPEAT = """
import json, os, sys, time
from cni.errors import CniError
from cni.launcher import broker_client
def ask(**request):
    while True:
        try:
            return broker_client.ask(sys.argv[1], ifnames=[], queues=None, shared=True, **request)
        except CniError as error:
            if error.code != 11:  # the broker's limit of connections a second
                raise
        time.sleep(0.05)
for line in sys.stdin:
    given = []
    for number in range(int(json.loads(line)["number"])):
        [(_, fds)] = ask(open=bool(number % 2))
        given += fds
    for fd in given:
        os.close(fd)
    print(json.dumps(len(os.listdir("/proc/self/fd"))), flush=True)
"""


def test_nothing_grows(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod, queues=2)
    assert agent.process
    proc = Path(f"/proc/{agent.process.pid}")  # nsenter(1) has become the agent

    def counted() -> tuple[int, int]:
        return len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir()))

    with Client(agent, pod, REPEAT) as client:
        client.ask(number=3)
        before = counted()  # the last request's own thread and fds may be among them, for a moment
        client.ask(number=120)
        until(
            lambda: all(now <= then for now, then in zip(counted(), before, strict=True)),
            f"{before} threads and fds have become more",
        )


def test_the_folder_has_the_socket_and_nothing_else(agent: Agent) -> None:
    folder = agent.run / "launcher"
    assert [path.name for path in folder.iterdir()] == ["broker.sock"]
    assert (folder.stat().st_mode & 0o7777, (folder / "broker.sock").stat().st_mode & 0o7777) == (
        0o755,
        0o666,
    )


def launch(agent: Agent, pod: Netns, *arguments: str, uid: int = 107) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        inpod.argv(pod.path, agent.run / "launcher", [str(BIN / "vmtap-launch"), *arguments], uid=uid),
        env={**os.environ, "VMTAP_BROKER": f"{inpod.MOUNTED}/broker.sock"},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )


STATUS = "cat /proc/self/status; ls -l /proc/$$/fd; ls /dev"


@pytest.mark.parametrize("supervised", [False, True])
def test_the_launcher_in_a_pod_has_nothing_to_drop_and_says_so(
    agent: Agent, lab: Lab, supervised: bool
) -> None:
    pod = lab.pod()
    attach(agent, pod, queues=2)
    options = ["--supervise"] if supervised else []
    done = launch(agent, pod, *options, "--", "/bin/sh", "-c", STATUS, uid=1000)
    assert done.returncode == 0, done.stderr
    for line in (
        "Uid:\t1000\t1000\t1000\t1000",
        "NoNewPrivs:\t1",
        *(f"Cap{kind}:\t{0:016x}" for kind in ("Inh", "Prm", "Eff", "Amb")),
    ):
        assert line in done.stdout
    queues = re.findall(r" (\d+) -> \S*node", done.stdout)
    assert queues == ["3", "4"]
    assert not {"net", "vhost-net"} & set(done.stdout.split())


def test_print_needs_no_fd(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    mac = attach(agent, pod, queues=2)
    with asking(agent, pod) as client:
        client.ask()
        done = launch(agent, pod, "--print", "--queues", "1", "--", "/bin/true")
        assert (done.returncode, done.stderr) == (0, "")
        assert "fds=3 " in done.stdout and mac in done.stdout


def test_exit_codes_of_the_launcher(agent: Agent, lab: Lab) -> None:
    pod = lab.pod()
    attach(agent, pod)
    sh = ("--", "/bin/sh", "-c", "exit 9")

    def fails(status: int, says: str, *options: str) -> None:
        done = launch(agent, pod, *options, *sh)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done
        assert says in done.stderr

    fails(os.EX_USAGE, "net1 has 1", "--queues", "2")
    fails(os.EX_UNAVAILABLE, "there is net1", "--ifname", "net7")
    fails(os.EX_NOPERM, "only root can become another user", "--user", "108:108")
    fails(os.EX_TEMPFAIL, "does not answer", "--broker", "/mnt/none.sock")
    fails(os.EX_USAGE, "leave --netns out", "--netns", "/proc/self/ns/net", "--shared")
    with asking(agent, pod) as client:
        client.ask()
        fails(os.EX_TEMPFAIL, "held by a running process")
        assert launch(agent, pod, "--shared", *sh).returncode == 9
    assert launch(agent, pod, "--user", "107:107", *sh).returncode == 9
    agent.end()
    fails(os.EX_TEMPFAIL, "is vmtapd running")


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The guest's kernel and initramfs."""
    with Image() as made:
        yield made


@contextmanager
def guest(agent: Agent, pod: Netns, image: Image, mac: str, processors: int) -> Iterator[Guest]:
    with Guest(
        image,
        None,
        [Nic(mac, ADDRESS)],
        under=inpod.argv(pod.path, agent.run / "launcher", []),
        env={**os.environ, "VMTAP_BROKER": f"{inpod.MOUNTED}/broker.sock"},
        processors=processors,
    ) as started:
        yield started


@pytest.mark.vm
@pytest.mark.parametrize(
    "fields",
    [{"mode": "vepa", "queues": 2}, {"source": "br0"}],
    ids=["macvtap of two queues", "tap on a bridge"],
)
def test_a_vm_of_an_unprivileged_pod_reaches_the_peer(
    agent: Agent, lab: Lab, image: Image, fields: dict[str, Any]
) -> None:
    pod = lab.pod()
    mac = attach(agent, pod, **fields)
    with guest(agent, pod, image, mac, fields.get("queues", 1)) as vm:
        vm.ready()
        assert vm.ping(PEER, wait=LIMIT)
        assert vm.run(f"ping -c 1 -W {LIMIT} -s 8000 {PEER}", 2 * LIMIT).status == 0
        proc = Path(f"/proc/{vm.process.pid}")
        assert (proc / "exe").readlink().name == "qemu-system-x86_64"
        status = (proc / "status").read_text()
        assert re.search(r"^Uid:\t107\t107\t107\t107$", status, re.M)
        assert set(re.findall(r"^Cap(?:Inh|Prm|Eff|Amb):\t(.*)$", status, re.M)) == {"0" * 16}
        assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
        for kind in ("user", "mnt", "net"):
            assert (proc / "ns" / kind).readlink() != Path(f"/proc/self/ns/{kind}").readlink()
        assert (proc / "ns/net").stat().st_ino == pod.path.stat().st_ino
        assert not [
            name for name in os.listdir(proc / "root/dev") if name.startswith(("tap", "net", "vhost"))
        ]
        refused(once(agent, pod), spec.DEVICE_BUSY, "held")  # exec(2) keeps the pid
        assert vm.power_off() == 0
    until(lambda: not held(agent), "the VM is gone and its file is not")
