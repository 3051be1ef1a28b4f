"""cni.policy: which files are trusted, what they may say, what a network configuration gets under them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni import spec
from cni.config import mac, netconf, nodefile, policy, schema
from cni.config.policy import Functions, Grant, Interface, Policy
from cni.errors import CniError
from cni.kernel.vf_settings import VfSettings
from cni.state import deviceid

if TYPE_CHECKING:
    from pathlib import Path

ENTRY = "interfaces: [{name: dataplane, source: {dev: eth1}}]\n"
PARSED = Policy((Interface("dataplane", "eth1", "ethernet", None, None),), allow_unlisted=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "interfaces.yaml"
    path.write_text(ENTRY)
    path.chmod(0o644)
    return path


def distrusted(path: Path) -> str:
    with pytest.raises(CniError) as caught:
        policy.load(path)
    assert caught.value.code == spec.INVALID_NETWORK_CONFIG
    assert str(path) in caught.value.msg
    assert "\n" not in str(caught.value)
    return caught.value.msg


# Who could have written it


def test_no_file(tmp_path: Path) -> None:
    assert policy.load(tmp_path / "interfaces.yaml") is None
    assert policy.load(tmp_path / "no-folder" / "interfaces.yaml") is None


def test_file(file: Path) -> None:
    assert policy.load(file) == PARSED


def test_relative_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert policy.load(file.name) == PARSED


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o777])
def test_writable_by_others(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert f"others may write to {file}; chmod go-w {file}" in distrusted(file)


def test_of_another_user(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(file, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert "belongs to user" in distrusted(file)


def test_folder_writable_by_others(file: Path) -> None:
    file.parent.chmod(0o777)
    assert f"others may write to {file.parent}; chmod go-w {file.parent}" in distrusted(file)


def test_folder_with_sticky_bit(file: Path) -> None:
    file.parent.chmod(0o1777)
    assert policy.load(file) == PARSED


def test_folder_on_a_read_only_mount(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadOnly:
        f_flag = os.ST_RDONLY

    file.parent.chmod(0o777)
    monkeypatch.setattr(os, "statvfs", lambda _: ReadOnly)
    assert policy.load(file) == PARSED


@pytest.fixture
def config_map(tmp_path: Path) -> Path:
    """As the kubelet lays one out."""
    (tmp_path / "..2024_01_01").mkdir()
    (tmp_path / "..2024_01_01" / "interfaces.yaml").write_text(ENTRY)
    (tmp_path / "..data").symlink_to("..2024_01_01")
    path = tmp_path / "interfaces.yaml"
    path.symlink_to("..data/interfaces.yaml")
    return path


def test_config_map(config_map: Path) -> None:
    assert policy.load(config_map) == PARSED


def test_config_map_with_a_folder_writable_by_others(config_map: Path) -> None:
    (config_map.parent / "..2024_01_01").chmod(0o777)
    assert "others may write to" in distrusted(config_map)


def test_folder_may_be_a_symlink(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "etc"
    link.symlink_to(file.parent)
    assert policy.load(link / file.name) == PARSED


def test_symlink_out_of_its_folder(file: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    link = tmp_path / "sub" / "interfaces.yaml"
    link.symlink_to(file)
    assert "symlink out of its folder" in distrusted(link)


def test_symlink_into_a_folder_of_similar_name(tmp_path: Path) -> None:
    for name in ("a", "ab"):
        (tmp_path / name).mkdir()
    (tmp_path / "ab" / "x.yaml").write_text(ENTRY)
    (tmp_path / "a" / "x.yaml").symlink_to("../ab/x.yaml")
    assert "symlink out of its folder" in distrusted(tmp_path / "a" / "x.yaml")


def test_dangling_symlink(tmp_path: Path) -> None:
    (tmp_path / "interfaces.yaml").symlink_to("nowhere")
    assert "leads nowhere" in distrusted(tmp_path / "interfaces.yaml")


def test_symlink_to_itself(tmp_path: Path) -> None:
    (tmp_path / "interfaces.yaml").symlink_to("interfaces.yaml")
    assert "cannot be read" in distrusted(tmp_path / "interfaces.yaml")


def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "interfaces.yaml")
    assert "not a regular file" in distrusted(tmp_path / "interfaces.yaml")


def test_folder_in_its_place(tmp_path: Path) -> None:
    assert "not a regular file" in distrusted(tmp_path)


def test_below_a_file(file: Path) -> None:
    assert "cannot be read" in distrusted(file / "interfaces.yaml")


def test_too_large(file: Path) -> None:
    file.write_text(ENTRY + "#" * nodefile.MAX_BYTES)
    assert "larger than 1048576 bytes" in distrusted(file)


def test_leaves_no_file_open(file: Path) -> None:
    before = os.listdir("/proc/self/fd")
    policy.load(file)
    file.chmod(0o666)
    distrusted(file)
    assert os.listdir("/proc/self/fd") == before


# What it may say


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "interfaces:\n", "interfaces: []\n", "{}"])
def test_nothing_is_listed(file: Path, text: str) -> None:
    file.write_text(text)
    assert policy.load(file) == Policy((), allow_unlisted=False)


def test_every_field(file: Path) -> None:
    file.write_text(
        """
interfaces:
  - name: dataplane
    source: {dev: eth1}
    type: vmdq
    modes: [vepa, private, pepa, vepa]
    capacity: 64.0
  - {name: storage, source: {dev: eth1}, modes: []}
  - {name: rest, source: {dev: "7"}, modes: }
allowUnlisted: true
"""
    )
    assert policy.load(file) == Policy(
        (
            Interface("dataplane", "eth1", "vmdq", ("vepa", "pepa"), 64),
            Interface("storage", "eth1", "ethernet", None, None),
            Interface("rest", "7", "ethernet", None, None),
        ),
        allow_unlisted=True,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", ", line 2, column 1: did not find expected node content"),
        ("interfaces: []\ninterfaces: []", ', line 2, column 1: the key "interfaces" stands twice'),
        (
            "interfaces:\n- name: a\n  source: {dev: eth0, dev: eth1}",
            ', line 3, column 23: the key "dev" stands twice',
        ),
        ("interfaces: &a []\nallowUnlisted: *a", ", line 2, column 16: the alias *a is not allowed"),
        ("a: &a [*a]", ", line 1, column 8: the alias *a is not allowed"),
        ("a: !!python/object/apply:os.system [x]", ", line 1, column 4: the tag"),
        ("a: !!timestamp x", ", line 1, column 4: the tag"),
        ("interfaces: []\n<<: {allowUnlisted: true}", ", line 2, column 1: a key must be a plain string"),
        ("1: x", ", line 1, column 1: a key must be a plain string"),
        ("? [a]\n: x", "line 1, column 3: a key must be a plain string"),
        ("[" * 100_000, "line 1, column 17: nested deeper than 16 levels"),
        ("{}\n---\n{}", "it has 2 documents; give one"),
        ("a: 2024-13-45", ": month must be in 1..12"),
        ("a: " + "9" * 5000, "too many digits"),
        ("a: \x00", "control characters are not allowed"),
        ("[]", ": the document: [] is not allowed; give an object"),
        ("false", ": the document: false is not allowed; give an object"),
        ("interfaces: 2024-01-01", ': interfaces: "2024-01-01" is not allowed; give a list'),
        ("interfaces: [{name: a}]", ": interfaces[0].source: is missing; give an object"),
        (
            "interfaces: [{name: a, source: {dev: e}}, {name: a, source: {dev: f}}]",
            ': interfaces[1].name: "a" is refused: it is the name of interfaces[0] already',
        ),
        (
            "interfaces: [{name: a, source: {dev: e}, modes: [passthru]}]",
            'interfaces[0].modes[0]: "passthru"',
        ),
        (
            "interfaces: [{name: a, source: {dev: e}, type: sriov}]",
            'interfaces[0].type: "sriov" is not allowed',
        ),
        ("interfaces: [{name: a, source: {dev: e}, capacity: 0}]", "interfaces[0].capacity: 0 is not"),
        ("interfaces: [{name: a, source: {dev: e}, mode: vepa}]", 'did you mean "modes"?'),
        ("interfaces: [{name: a, source: {dev: e}, mac: {deny: ['02:0']}}]", 'mac.deny[0]: "02:0" is not'),
        ("mac: {deny: [52:54:00]}", "mac.deny[0]: 190440 is not allowed; give a MAC, its first bytes"),
        ("mac: {deny: ['02:00-02:01']}", "mac.deny[0]"),
        ("mac: {allow: ['02:00:00:00:00:02-02:00:00:00:00:01']}", "the range ends before it begins"),
        ("mac: {derivedonly: true}", 'did you mean "derivedOnly"?'),
        ("allowUnlisted: maybe", ': allowUnlisted: "maybe" is not allowed; give true or false'),
    ],
)
def test_mistakes_are_located(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    assert message in distrusted(file)


def test_not_utf_8(file: Path) -> None:
    file.write_bytes(ENTRY.encode("utf-16"))
    assert "byte 0 is not UTF-8" in distrusted(file)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text(alphabet=":-[]{}&*!<>|#?,'\"% \n\tab1").map(str.encode))
def test_whatever_it_says_is_parsed_or_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        assert isinstance(policy.load(file), Policy)
    except CniError as error:
        assert error.code == spec.INVALID_NETWORK_CONFIG
        assert "\n" not in str(error)


# What it grants


def conf(**fields: Any) -> netconf.NetConf:
    return netconf.parse(json.dumps({"name": "net", "type": "vmtap"} | fields).encode())


def entry(name: str, dev: str, *modes: str, type_: str = "ethernet") -> Interface:
    return Interface(name, dev, type_, modes or None, None)


LISTED = (
    entry("dataplane", "eth1", "vepa", "bridge"),
    entry("storage", "eth2"),
    entry("quiet", "eth2", "pepa"),
    entry("lan", "br0", "vepa", "pepa"),
    entry("vf", "eth3", type_="sr-iov"),
    entry("vf-quiet", "eth3", "pepa", type_="sr-iov"),
    entry("queues", "eth4", type_="vmdq"),
)
CLOSED = Policy(LISTED, allow_unlisted=False)
OPEN = Policy(LISTED, allow_unlisted=True)


@pytest.mark.parametrize(
    ("rules", "fields", "grant"),
    [
        # a name
        (CLOSED, {"interface": "dataplane"}, Grant("dataplane", "eth1", None, "vepa", "ethernet")),
        (CLOSED, {"interface": "dataplane", "mode": "bridge"},
         Grant("dataplane", "eth1", None, "bridge", "ethernet")),
        (CLOSED, {"interface": "storage"}, Grant("storage", "eth2", None, "bridge", "ethernet")),
        (CLOSED, {"interface": "storage", "mode": "private", "device": "macvtap"},
         Grant("storage", "eth2", "macvtap", "pepa", "ethernet")),
        (CLOSED, {"interface": "storage", "source": "eth2"},
         Grant("storage", "eth2", None, "bridge", "ethernet")),
        (CLOSED, {"interface": "vf"}, Grant("vf", "eth3", None, "bridge", "sr-iov")),
        (CLOSED, {"interface": "queues", "mode": "pepa"}, Grant("queues", "eth4", None, "pepa", "vmdq")),
        (CLOSED, {"interface": "lan", "device": "tap"}, Grant("lan", "br0", "tap", "pepa", "ethernet")),
        (CLOSED, {"interface": "lan"}, Grant("lan", "br0", None, "vepa", "ethernet")),
        # a device
        (None, {"source": "eth9"}, Grant(None, "eth9", None, "bridge", "ethernet")),
        (None, {"source": "eth9", "mode": "vepa"}, Grant(None, "eth9", None, "vepa", "ethernet")),
        (OPEN, {"source": "eth9"},
         Grant(None, "eth9", None, "bridge", "ethernet",
               listed=frozenset({"eth1", "eth2", "eth3", "eth4", "br0"}))),
        (CLOSED, {"source": "eth1"}, Grant("dataplane", "eth1", None, "vepa", "ethernet")),
        (OPEN, {"source": "eth1"}, Grant("dataplane", "eth1", None, "vepa", "ethernet")),
        (CLOSED, {"source": "eth2", "mode": "pepa"}, Grant("storage", "eth2", None, "pepa", "ethernet")),
        # what the kubelet allocated
        (CLOSED, {"deviceID": "dataplaneMvp12"}, Grant("dataplane", "eth1", "macvtap", "vepa", "ethernet")),
        (CLOSED, {"deviceID": "dataplaneMvp0", "interface": "dataplane"},
         Grant("dataplane", "eth1", "macvtap", "vepa", "ethernet")),
        (CLOSED, {"deviceID": "dataplaneMvp0", "source": "eth1"},
         Grant("dataplane", "eth1", "macvtap", "vepa", "ethernet")),
        (CLOSED, {"deviceID": "0000:04:00.5", "interface": "storage"},
         Grant("storage", "eth2", None, "bridge", "ethernet")),
        # no wire
        (None, {"device": "tap"}, Grant(None, None, "tap", None, "ethernet")),
        (CLOSED, {"device": "tap"}, Grant(None, None, "tap", None, "ethernet")),
    ],
)  # fmt: skip
def test_granted(rules: Policy | None, fields: dict[str, Any], grant: Grant) -> None:
    assert policy.authorize(rules, conf(**fields)) == grant


NAMES = "dataplane, storage, quiet, lan, vf, vf-quiet, queues"


@pytest.mark.parametrize(
    ("rules", "fields", "message"),
    [
        (CLOSED, {"interface": "dataplan"},
         'interface: "dataplan" is refused: the policy has no interface dataplan; did you mean "dataplane"?'),
        (OPEN, {"interface": "xyzzy"},
         f'interface: "xyzzy" is refused: the policy has no interface xyzzy; known are: {NAMES}'),
        (None, {"interface": "a"},
         'interface: "a" is refused: this node has no policy file that could define a'),
        (Policy((), allow_unlisted=True), {"interface": "a"},
         'interface: "a" is refused: the policy has no interface a; known are: none'),
        (CLOSED, {"interface": "dataplane", "mode": "private"},
         'mode: "pepa" is refused: interface dataplane allows vepa, bridge'),
        (CLOSED, {"source": "eth1", "mode": "pepa"},
         'mode: "pepa" is refused: on eth1 the policy allows vepa, bridge'),
        (OPEN, {"source": "eth1", "mode": "pepa"},
         'mode: "pepa" is refused: on eth1 the policy allows vepa, bridge'),
        (CLOSED, {"source": "eth9"},
         f'source: "eth9" is refused: the policy does not list it; interfaces are: {NAMES}'),
        (Policy((), allow_unlisted=False), {"source": "eth9"},
         'source: "eth9" is refused: the policy does not list it; interfaces are: none'),
        (OPEN, {"interface": "storage", "source": "eth1"},
         'source: "eth1" is refused: interface storage is eth2; leave one of the two out'),
        (CLOSED, {"interface": "vf", "mode": "pepa"},
         'mode: "pepa" is refused: no NIC\'s embedded switch can keep its virtual functions apart'),
        (CLOSED, {"interface": "vf-quiet"},
         'mode: "pepa" is refused: no NIC\'s embedded switch can keep its virtual functions apart'),
        (CLOSED, {"interface": "lan", "device": "tap", "mode": "vepa"},
         'mode: "vepa" is refused: a tap is a port of a bridge, '
         'and bridges deliver between their ports themselves'),
        (None, {"source": "br0", "device": "tap", "mode": "vepa"},
         'mode: "vepa" is refused: a tap is a port of a bridge, '
         'and bridges deliver between their ports themselves'),
        (CLOSED, {"deviceID": "storageMvp1", "interface": "dataplane"},
         'interface: "dataplane" is refused: the allocated deviceID storageMvp1 is of another one'),
        (CLOSED, {"deviceID": "dataplaneMvp1", "source": "eth2"},
         'source: "eth2" is refused: interface dataplane is eth1; leave one of the two out'),
        (CLOSED, {"deviceID": "dataplanMvp1"},
         'deviceID: "dataplanMvp1" is refused: '
         'the policy has no interface dataplan; did you mean "dataplane"?'),
        (CLOSED, {"deviceID": "0000:04:00.5"},
         'deviceID: "0000:04:00.5" is refused: it names no interface; '
         'give interface, source, a deviceID of the form NAMEMvpN, or device tap for a plain tap; '
         f'interfaces are: {NAMES}'),
        (None, {},
         'interface: is missing; '
         'give interface, source, a deviceID of the form NAMEMvpN, or device tap for a plain tap; '
         'this node has no policy file, so any device may be the source'),
        (CLOSED, {"device": "macvtap"},
         'interface: is missing; '
         'give interface, source, a deviceID of the form NAMEMvpN, or device tap for a plain tap; '
         f'interfaces are: {NAMES}'),
        (None, {"device": "tap", "mode": "bridge"},
         'mode: "bridge" is refused: a plain tap has no wire; give an interface or a source as well'),
    ],
)  # fmt: skip
def test_refused(rules: Policy | None, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CniError) as caught:
        policy.authorize(rules, conf(**fields))
    assert (caught.value.code, caught.value.msg) == (spec.INVALID_NETWORK_CONFIG, message)


MODES = st.sampled_from(["vepa", "pepa", "bridge"])
DEVS = st.sampled_from(["eth1", "eth2", "eth3"])
ENTRIES = st.builds(
    Interface,
    name=st.sampled_from("abcd"),
    dev=DEVS,
    type=st.sampled_from(["ethernet", "vmdq", "sr-iov"]),
    modes=st.none() | st.lists(MODES, min_size=1, unique=True).map(tuple),
    capacity=st.none(),
)
POLICIES = st.builds(
    Policy,
    st.lists(ENTRIES, max_size=4, unique_by=lambda each: each.name).map(tuple),
    st.just(False),
)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "interface": st.sampled_from("abcd"),
        "source": DEVS,
        "mode": MODES,
        "device": st.sampled_from(["macvtap", "tap"]),
        "deviceID": st.sampled_from(["aMvp0", "bMvp12", "x"]),
    },
)


@settings(max_examples=500, deadline=None)
@given(POLICIES, ASKED)
def test_a_configuration_never_widens_the_policy(rules: Policy, fields: dict[str, Any]) -> None:
    try:
        grant = policy.authorize(rules, conf(**fields))
    except CniError as error:
        assert error.code == spec.INVALID_NETWORK_CONFIG
        return
    if grant.source is None:
        assert grant == Grant(None, None, "tap", None, "ethernet")
        return
    entry = next(each for each in rules.interfaces if each.name == grant.interface)
    assert (entry.dev, entry.type) == (grant.source, grant.type)
    assert entry.modes is None or grant.mode in entry.modes
    assert (grant.type, grant.mode) != ("sr-iov", "pepa")
    assert fields.get("mode", grant.mode) == grant.mode
    device = deviceid.parse(fields.get("deviceID") or "")
    assert grant.device == (fields.get("device") or ("macvtap" if device else None))
    assert device is None or device[1] < entry.devices


# Virtual functions and VLANs


def _of(entry: str) -> Interface:
    import yaml  # noqa: PLC0415

    document = yaml.safe_load(f"interfaces: [{{name: fast, {entry}}}]")
    (made,) = policy.of("policy", document).interfaces
    return made


def test_an_entry_of_virtual_functions() -> None:
    made = _of(
        "source: {dev: [eth1, eth2, eth1]}, type: sr-iov, vfs: 8, spoofchk: true, trust: false, "
        "minTxRate: 10, maxTxRate: 100, linkState: enable"
    )
    assert made.dev == "eth1"
    assert made.functions == policy.Functions(
        ("eth1", "eth2"), 8, VfSettings(spoofchk=1, trust=0, rate=(10, 100), link_state=1)
    )
    assert _of("source: {dev: eth1}, type: sr-iov").functions == policy.Functions(
        ("eth1",), None, VfSettings()
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("source: {dev: eth1}, vfs: 8", "interfaces[0].vfs"),
        ("source: {dev: eth1}, type: vmdq, trust: true", "type vmdq has no virtual functions"),
        ("source: {dev: [eth1, eth2]}", "type ethernet has one device"),
        ("source: {dev: []}, type: sr-iov", "the list is empty"),
    ],
)
def test_what_only_virtual_functions_have_is_refused_elsewhere(entry: str, said: str) -> None:
    with pytest.raises(CniError) as refused:
        _of(entry)
    assert (refused.value.code, said in refused.value.msg) == (7, True)


@pytest.mark.parametrize(
    ("vlans", "asked", "granted"),
    [("", None, None), ("", 5, 5), ("vlans: [100, 200]", None, 100), ("vlans: [100, 200]", 200, 200)],
)
def test_the_vlan_is_one_that_the_entry_allows(vlans: str, asked: int | None, granted: int | None) -> None:
    entry = _of(f"source: {{dev: eth1}}, {vlans}")
    fields = {} if asked is None else {"vlan": asked}
    conf = netconf.parse(
        json.dumps({"name": "wire", "type": "vmtap", "interface": "fast", **fields}).encode()
    )
    vlan = policy.authorize(Policy((entry,), allow_unlisted=False), conf).vlan
    assert (vlan.id if vlan else None) == granted


def test_a_vlan_that_the_entry_does_not_allow_is_refused() -> None:
    entry = _of("source: {dev: eth1}, vlans: [100, 200]")
    conf = netconf.parse(b'{"name": "wire", "type": "vmtap", "interface": "fast", "vlan": 300}')
    with pytest.raises(CniError, match="interface fast allows 100, 200"):
        policy.authorize(Policy((entry,), allow_unlisted=False), conf)


@pytest.mark.parametrize(
    ("line", "source", "most"),
    [
        ("interfaces: [{name: fast, source: {dev: eth1}}]", "eth1", 1000),
        ("interfaces: [{name: fast, source: {dev: eth1}, bcqueuelen: 5000}]", "eth1", 5000),
        ("interfaces: [{name: fast, source: {dev: eth1}, bcqueuelen: 0}]", "eth1", 0),
        ("allowUnlisted: true", "eth2", 1000),
    ],
)
def test_no_network_has_more_than_the_devices_queue_of_broadcasts(
    file: Path, line: str, source: str, most: int
) -> None:
    """The kernel gives a device the longest queue that one of its macvtaps requests."""
    file.write_text(line)
    policy.authorize(policy.load(file), conf(source=source, bcqueuelen=most))
    policy.authorize(policy.load(file), conf(source=source))
    with pytest.raises(
        CniError, match=f"bcqueuelen: {most + 1} is refused: the policy allows at most {most}"
    ):
        policy.authorize(policy.load(file), conf(source=source, bcqueuelen=most + 1))
    policy.authorize(None, conf(source=source, bcqueuelen=4294967295))


def pool(capacity: int | None = None) -> Policy:
    functions = Functions(("pf0", "pf1"), None, VfSettings())
    return Policy((Interface("fast", "pf0", "sr-iov", None, capacity, functions),), allow_unlisted=False)


def test_a_virtual_functions_number_is_bounded_by_what_there_is() -> None:
    """How many VFs a node has is no matter of its policy: cni/lower/sriov.py refuses a number that has none."""
    last = f"fastMvp{deviceid.MOST - 1}"
    assert policy.authorize(pool(), conf(deviceID=last)).sources == ("pf0", "pf1")
    with pytest.raises(CniError, match="offers 4 devices"):
        policy.authorize(pool(4), conf(deviceID="fastMvp4"))


def test_a_virtual_functions_number_is_counted_through_the_whole_pool() -> None:
    assert policy.authorize(pool(), conf(source="pf1")).sources == ("pf1",)
    with pytest.raises(CniError, match="says which; leave it out"):
        policy.authorize(pool(), conf(source="pf1", deviceID="fastMvp0"))


def test_the_derivation_of_macs_reaches_every_grant() -> None:
    document = {
        "interfaces": [{"name": "fast", "source": {"dev": "eth1"}}],
        "macSeed": "s",
        "macPrefix": "02:ab:cd",
        "allowUnlisted": True,
    }
    rules = policy.of("policy", document)
    for fields in ({"interface": "fast"}, {"source": "eth1"}, {"source": "eth9"}, {"device": "tap"}):
        assert policy.authorize(rules, conf(**fields)).derivation == mac.Derivation("s", "02:ab:cd")
    assert policy.authorize(None, conf(source="eth1")).derivation == mac.PLAIN


@pytest.mark.parametrize("prefix", ["02-AB-CD", "02:AB:CD", "02-ab-cd"])
def test_the_forms_of_a_prefix(prefix: str) -> None:
    assert policy.of("policy", {"macPrefix": prefix}).derivation.prefix == "02:ab:cd"


FIELDS = {
    key: rule
    for key, rule in schema.load("policy")["properties"]["interfaces"]["items"]["properties"].items()
    if key not in ("name", "source")
}


@pytest.mark.parametrize("key", FIELDS)
def test_nothing_is_not_given(file: Path, key: str) -> None:
    """Null, and "" in a string. Of a limit, 0 may have been meant as none: it is refused where it is no limit."""
    entry = {"name": "a", "source": {"dev": "eth1"}} | ({} if key == "type" else {"type": "sr-iov"})
    more = {"macPrefix": None, "macSeed": None, "allowUnlisted": None, "mac": None}
    file.write_text(json.dumps({"interfaces": [entry | {key: None}]} | more))
    assert policy.load(file) == policy.of("", {"interfaces": [entry]})
    file.write_text(json.dumps({"interfaces": [entry | {key: ""}]}))
    if FIELDS[key]["type"] == "string":
        assert policy.load(file) == policy.of("", {"interfaces": [entry]})
    else:
        with pytest.raises(CniError, match="is not allowed; give"):
            policy.load(file)


@pytest.mark.parametrize("key", ["capacity", "vfs"])
def test_no_devices_is_refused(file: Path, key: str) -> None:
    file.write_text(f"interfaces:\n- {{name: a, source: {{dev: eth1}}, type: sr-iov, {key}: 0}}\n")
    with pytest.raises(CniError, match=f"{key}: 0 is not allowed; give an integer from 1"):
        policy.load(file)


def test_a_foreign_word_names_ours(file: Path) -> None:
    file.write_text("interfaces:\n- {name: a, lowerDevice: eth1, mode: bridge}\n")
    with pytest.raises(CniError, match=r"lowerDevice: unknown key.*give source: {dev: NAME}") as caught:
        policy.load(file)
    assert 'did you mean "modes"?' in caught.value.details


@pytest.mark.parametrize("prefix", ["01:00:5e", "02:ab", "02:ab:cd:ef", "02-ab:cd", "02:ab:cd\n", ""])
def test_a_prefix_that_is_none_is_refused(prefix: str) -> None:
    assert not schema.accepts(schema.load("policy"), {"macPrefix": prefix})


def test_a_prefix_that_yaml_reads_as_a_number_is_refused(file: Path) -> None:
    """52:54:00 is 190440 seconds to YAML 1.1."""
    file.write_text("macPrefix: 52:54:00")
    assert (
        "macPrefix: 190440 is not allowed; give three hexadecimal pairs with colons, in quotes"
        in distrusted(file)
    )
    file.write_text("macPrefix: '52:54:00'")
    found = policy.load(file)
    assert found
    assert found.derivation == mac.Derivation("", "52:54:00")


@pytest.mark.parametrize(
    ("written", "type", "allowed"),
    [
        ("", "host-local", True),
        ("ipamTypes:", "host-local", True),
        ("ipamTypes: []", "host-local", False),
        ("ipamTypes: [static, host-local]", "host-local", True),
        ("ipamTypes: [static]", "host-local", False),
    ],
)
def test_ipam_types(file: Path, written: str, type: str, *, allowed: bool) -> None:
    file.write_text(f"allowUnlisted: true\n{written}\n")
    rules, asked = policy.load(file), conf(source="eth1", ipam={"type": type})
    policy.authorize(rules, conf(source="eth1"))
    policy.authorize(rules, asked, delegate=False)
    if allowed:
        policy.authorize(rules, asked)
    else:
        with pytest.raises(CniError, match=r"ipam\.type.*ipamTypes of the policy are"):
            policy.authorize(rules, asked)


@pytest.mark.parametrize("type", ["", "a/b", "..", "a\n"])
def test_an_ipam_type_is_a_file_name(file: Path, type: str) -> None:
    file.write_text(f"ipamTypes: [{json.dumps(type)}]\n")
    with pytest.raises(CniError, match=r"ipamTypes\[0\]"):
        policy.load(file)
