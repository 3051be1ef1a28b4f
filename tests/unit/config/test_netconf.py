"""cni.netconf: what is read, what is refused with which code, what DEL and GC let pass."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cni import spec
from cni.config import foreign, netconf, schema
from cni.errors import CniError

ROOT = Path(__file__).parents[3]
A, B, C = "02:00:00:00:00:0a", "02:00:00:00:00:0b", "02:00:00:00:00:0c"
BASE = {"cniVersion": "1.1.0", "name": "net", "type": "vmtap"}
COSTLY = (
    "jsonschema",
    "yaml",
    "pyroute2",
    "typing",
    "difflib",
    "ipaddress",
    "pathlib",
    "logging",
    "argparse",
)


def conf(fields: dict[str, Any], **options: str) -> netconf.NetConf:
    return parse(json.dumps(BASE | fields).encode(), **options)


def parse(stdin: bytes, *, args: str = "", command: str = "ADD", called_as: str = "vmtap") -> netconf.NetConf:
    """As a request has it."""
    parsed = netconf.parse(stdin, command=command, called_as=called_as)
    return netconf.with_arguments(parsed, netconf.arguments(args, command=command))


def refused(stdin: bytes | dict[str, Any], **options: str) -> CniError:
    raw = stdin if isinstance(stdin, bytes) else json.dumps(BASE | stdin).encode()
    with pytest.raises(CniError) as caught:
        parse(raw, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_minimal() -> None:
    parsed = netconf.parse(b'{"name": "net", "type": "vmtap"}')
    assert parsed == netconf.NetConf(
        cni_version="0.1.0",
        name="net",
        type="vmtap",
        interface=None,
        source=None,
        device=None,
        mode=None,
        mac=None,
        mac_is_final=False,
        mtu=None,
        queues=1,
        promisc=False,
        allmulti=True,
        bcqueuelen=None,
        owner=None,
        group=None,
        addressing="guest",
        handover=True,
        vlan=None,
        ipam=None,
        dns=None,
        prev_result=None,
        device_id=None,
        valid_attachments=None,
        port=None,
        bandwidth=None,
        raw={"name": "net", "type": "vmtap"},
    )


def test_every_field_arrives() -> None:
    given_ = {
        "interface": "dataplane",
        "source": "eth1",
        "device": "tap",
        "mode": "bridge",
        "mtu": 9000,
        "queues": 4,
        "promisc": True,
        "allmulti": False,
        "bcqueuelen": 1,
        "owner": 0,
        "group": 4294967294,
        "addressing": "link",
        "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/24"}]]},
        "dns": {"nameservers": ["10.0.0.1"]},
    }
    parsed = conf(given_)
    assert {key: getattr(parsed, key) for key in given_} == given_
    assert parsed.raw == BASE | given_


def test_valid_configuration_imports_nothing_costly() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from cni.attach import result
from cni.config import netconf, policy
netconf.parse({json.dumps(BASE | {"interface": "a", "mac": A}).encode()!r})
netconf.arguments("MAC={B}")
result.render(result.Result(interfaces=(result.Interface("eth0"),)), "1.1.0")
print(*(name for name in {COSTLY!r} if name in sys.modules))
"""
    # -S: nothing that a virtual environment's start-up files import.
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


@pytest.mark.parametrize(
    "stdin",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"name": "a"} {}',
        b'\xef\xbb\xbf{"name": "a"}',
        '{"name": "a"}'.encode("utf-16"),
        '{"name": "a"}'.encode("utf-16-le"),
        '{"name": "a"}'.encode("utf-32"),
        b'{"name": "\xff"}',
        b'{"name": "\xed\xa0\x80"}',
        b'{"name": "a", "name": "b"}',
        b'{"name": "a", "ipam": {"x": [{"y": 1, "y": 1}]}}',
        b'{"name": "a", "mtu": NaN}',
        b'{"name": "a", "mtu": -Infinity}',
        b'{"name": "a", "mtu": 1e999}',
        b'{"name": "a", "ipam": {"x": -1e999}}',
        b'{"name": "a", "args": ["\\ud800"]}',
        b'{"name": "a", "args": {"\\udfff": 1}}',
        b'{"name": "a", "ipam": {"x": "\\u0000"}}',
        b'{"name": "a", "mtu": ' + b"9" * 5000 + b"}",
        b'{"name": ' + b"[" * 100_000,
        b'{"name": "a", "args": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"name": "a", "args": ' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"a":' * 100_000,
    ],
    ids=lambda stdin: repr(stdin[:40]),
)
@pytest.mark.parametrize("command", ["ADD", "GC"])
def test_undecodable(stdin: bytes, command: str) -> None:
    error = refused(stdin, command=command)
    assert error.code == spec.DECODING_FAILURE
    assert not re.search("codec|utf-8-sig|char |recursion|Error", error.msg)
    assert netconf.parse(stdin, command="DEL").name == ""


@pytest.mark.parametrize(
    ("command", "most"), [("ADD", 256), ("CHECK", 256), ("STATUS", 256), ("DEL", 1024), ("GC", 1024)]
)
def test_too_large(command: str, most: int) -> None:
    stdin = json.dumps(BASE).encode()
    if command == "DEL":
        assert netconf.parse(stdin.ljust((most << 10) + 1), command=command).name == ""
    else:
        error = refused(stdin.ljust((most << 10) + 1), command=command)
        assert (error.code, f"larger than {most} KiB" in error.msg) == (spec.DECODING_FAILURE, True)
    netconf.parse(stdin.ljust(most << 10), command=command)


@pytest.mark.parametrize("unit", ["[]", "{}", "1", '"a"', '{"a":1}'])
def test_too_many_values(unit: str) -> None:
    """They are counted before they are decoded."""
    text = json.dumps(BASE)[:-1] + ', "args": [' + ",".join([unit] * (1 << 15)) + "]}"
    error = refused(text.encode(), command="GC")
    assert (error.code, "more than 32768 commas" in error.msg) == (spec.DECODING_FAILURE, True)


def test_a_gc_may_list_thousands_of_attachments() -> None:
    ids = [f"{number:064x}" for number in range(5000)]
    value = [{"containerID": id, "ifname": "net1"} for id in ids]
    found = conf({netconf.VALID_ATTACHMENTS: value}, command="GC").valid_attachments
    assert found == frozenset((id, "net1") for id in ids)


def test_surrogate_pairs_are_characters() -> None:
    assert netconf.parse(b'{"name": "a", "args": "\\ud83d\\ude00"}').raw["args"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize("version", spec.VERSIONS)
def test_versions(version: str) -> None:
    assert conf({"cniVersion": version}).cni_version == version


@pytest.mark.parametrize("version", ["", None])
def test_no_version_is_the_first(version: str | None) -> None:
    assert conf({"cniVersion": version}).cni_version == "0.1.0"


def test_version_goes_before_everything_else() -> None:
    error = refused(b'{"cniVersion": "9.9.9", "nmae": 1, "mtu": "x"}', args="rubbish")
    assert error.code == spec.INCOMPATIBLE_VERSION
    assert '"9.9.9"' in error.msg
    assert "1.1.0" in error.msg


@pytest.mark.parametrize("version", [1.1, 0, True, False, ["1.1.0"], {}])
def test_version_is_a_string(version: Any) -> None:
    assert refused({"cniVersion": version}).code == spec.DECODING_FAILURE


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (b'{"cniVersion": "9.9"}', "9.9"),
        (b"{}", None),
        (b"", None),
        (b"[]", None),
        (b'{"cniVersion": 1}', None),
    ],
)
def test_the_version_of_a_document(stdin: bytes, version: str | None) -> None:
    assert netconf.Document(stdin).version == version


@pytest.mark.parametrize("command", ["ADD", "CHECK", "GC", "STATUS"])
@pytest.mark.parametrize("name", ["", None, 1, "a/b", ".a", "-a", "a b", "a\n", "\n", "é", ["a"], "a:b"])
def test_name_is_refused(name: Any, command: str) -> None:
    error = refused({"name": name}, command=command)
    assert error.code == spec.INVALID_NETWORK_CONFIG
    assert error.msg.startswith("name: ")
    assert (
        conf({"name": name, "ipam": {"type": "x"}}, command="DEL").ipam is None
    )  # it could take it for a path


@pytest.mark.parametrize("name", ["a", "A.b_c-1", "0", "a" * 300])
def test_name_is_accepted(name: str) -> None:
    assert conf({"name": name}).name == name


@pytest.mark.parametrize("command", ["ADD", "GC"])
def test_name_is_missing(command: str) -> None:
    error = refused(b'{"cniVersion": "1.1.0"}', command=command)
    assert error.code == spec.INVALID_NETWORK_CONFIG
    assert error.msg.startswith("name: is missing")


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("modee", "vepa", "mode"),
        ("MTU", 1500, "mtu"),
        ("promiscMode", True, "promisc"),
        ("intreface", "x", "interface"),
        ("all_multi", True, "allmulti"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, value: Any, nearest: str) -> None:
    error = refused({key: value})
    assert error.code == spec.UNSUPPORTED_FIELD
    assert error.msg == f'{key}: unknown key, its value is {json.dumps(value)}; did you mean "{nearest}"?'


def test_unknown_key_like_no_other_lists_a_few() -> None:
    assert refused({"xyzzy": 1}).msg.endswith(
        "known are: cniVersion, cniVersions, name, type, interface, source, device, mode and 27 more"
    )


def test_unknown_key_lists_what_is_near() -> None:
    assert refused({"checkOff": 1}).msg.endswith("; near it: disableCheck")


def test_well_known_keys_are_accepted() -> None:
    fields = {
        "cniVersions": ["0.4.0"],
        "ipam": {},
        "dns": {"nameservers": None, "x": 1},
        "args": {"cni": {"labels": []}},
        "capabilities": {"bandwidth": True},
        "runtimeConfig": {"bandwidth": {"ingressRate": 1}},
        "prevResult": {},
        "ipMasq": False,
        "disableCheck": True,
        "disableGC": True,
        "loadOnlyInlinedPlugins": False,
        "deviceID": "0000:04:00.5",
        "pciBusID": "0000:04:00.5",
        "cni.dev/attachments": [1],
        "cni.dev/whatever": {"a": 1},
    }
    assert conf(fields).raw == BASE | fields


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("device", "macvlan", 'one of "macvtap", "tap"'),
        ("mode", "passthru", 'one of "vepa", "pepa", "private", "bridge"'),
        ("mtu", 67, "an integer from 68 to 65535"),
        ("mtu", 65536, "an integer from 68 to 65535"),
        ("mtu", "1500", "an integer from 68 to 65535"),
        ("mtu", 1500.5, "an integer from 68 to 65535"),
        ("mtu", True, "an integer from 68 to 65535"),
        ("queues", -1, "an integer from 1 to 256"),
        ("mtu", "", "an integer from 68 to 65535"),
        ("promisc", 0, "true or false"),
        ("allmulti", "", "true or false"),
        ("ipam", 0, "an object"),
        ("queues", 257, "an integer from 1 to 256"),
        ("bcqueuelen", -1, "an integer from 1 to 4294967295"),
        ("owner", 4294967295, "an integer from 0 to 4294967294"),
        ("group", -1, "an integer from 0 to 4294967294"),
        ("promisc", 1, "true or false"),
        ("allmulti", "yes", "true or false"),
        ("addressing", "host", 'one of "guest", "link"'),
        ("source", "a" * 16, "at most 15"),
        ("source", "..", "device name"),
        ("source", "a/b", "device name"),
        ("source", "a b", "device name"),
        ("source", "eth0\n", "device name"),
        ("interface", "a/b", "letters, digits"),
        ("interface", "a" * 51, "at most 50"),
        ("mac", "52:54:00:12:34", "unicast MAC"),
        ("mac", "52:54:00:12:34:56\n", "unicast MAC"),
        ("mac", "52-54-00-12-34:56", "unicast MAC"),
        ("mac", "52-54-00-12-34-56-78-90", "unicast MAC"),
        ("mac", "5254.0012.345", "unicast MAC"),
        ("mac", "525400123456", "unicast MAC"),
        ("mac", 1, "unicast MAC"),
        ("ipam", [], "an object"),
        ("prevResult", "x", "an object"),
    ],
)
def test_value_is_refused_with_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    error = refused({key: value})
    assert error.code == spec.INVALID_NETWORK_CONFIG
    assert error.msg.startswith(f"{key}")
    assert allowed in error.msg
    assert json.dumps(value) in error.msg


def test_capabilities_are_booleans() -> None:
    error = refused({"capabilities": {"mac": "yes"}})
    assert error.code == spec.INVALID_NETWORK_CONFIG
    assert error.msg == 'capabilities.mac: "yes" is not allowed; give true or false'


@pytest.mark.parametrize("kind", ["../x", "a/b", "a\\b", ".", ".."])
def test_ipam_type_has_no_path(kind: str) -> None:
    error = refused({"ipam": {"type": kind}})
    assert (error.code, error.msg[:10]) == (spec.INVALID_NETWORK_CONFIG, "ipam.type:")


@pytest.mark.parametrize("ipam", [None, {}, {"type": ""}, {"type": None}, {"ranges": []}])
def test_nothing_to_delegate(ipam: Any) -> None:
    assert conf({"ipam": ipam}).ipam is None


def test_an_integer_may_be_written_as_a_float() -> None:
    parsed = netconf.parse(b'{"name": "a", "mtu": 1.5e3, "queues": 2.0}')
    assert (parsed.mtu, parsed.queues) == (1500, 2)
    assert isinstance(parsed.mtu, int)


@pytest.mark.parametrize(("given_", "canonical"), [("private", "pepa"), ("pepa", "pepa"), ("vepa", "vepa")])
def test_private_is_pepa(given_: str, canonical: str) -> None:
    assert conf({"mode": given_}).mode == canonical


@pytest.mark.parametrize(
    ("fields", "args", "mac"),
    [
        ({}, "", None),
        ({"mac": A.upper()}, "", A),
        ({"mac": A}, f"MAC={B}", B),
        ({"mac": A}, "MAC=", A),
        ({"mac": A, "capabilities": {"mac": True}, "runtimeConfig": {"mac": C}}, f"MAC={B}", C),
        ({"mac": A, "runtimeConfig": {"mac": C}}, "", C),
        ({"mac": A, "capabilities": {"mac": False}, "runtimeConfig": {"mac": C}}, "", A),
        ({"mac": A, "capabilities": {}, "runtimeConfig": {"mac": C}}, f"MAC={B}", B),
        ({"capabilities": {"deviceID": True}, "runtimeConfig": {"mac": "rubbish"}}, "", None),
        ({}, f"IgnoreUnknown=1;MAC={A};IgnoreUnknown=1;MAC={B}", B),
    ],
)
def test_mac_precedence(fields: dict[str, Any], args: str, mac: str | None) -> None:
    assert conf(fields, args=args).mac == mac


@pytest.mark.parametrize(
    ("mac", "reason"),
    [
        ("01:00:5e:00:00:01", "is a multicast address"),
        ("ff:ff:ff:ff:ff:ff", "is a multicast address"),
        ("00:00:00:00:00:00", "is no address"),
    ],
)
def test_mac_is_unicast(mac: str, reason: str) -> None:
    for error, code, where in (
        (refused({"mac": mac}), spec.INVALID_NETWORK_CONFIG, "mac"),
        (refused({"runtimeConfig": {"mac": mac}}), spec.INVALID_NETWORK_CONFIG, "runtimeConfig.mac"),
        (refused({}, args=f"MAC={mac}"), spec.INVALID_ENVIRONMENT, "CNI_ARGS: MAC"),
    ):
        assert error.code == code
        assert error.msg.startswith(f'{where}: "{mac}" {reason}')


FORMS = ("02-AB-00-00-10-01", "02:AB:00:00:10:01", "02ab.0000.1001", "02AB.0000.1001", "02:ab:00:00:10:01")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", ["ADD", "CHECK", "STATUS"])
def test_the_forms_of_a_mac(form: str, command: str) -> None:
    """Those of Go's net.ParseMAC, from wherever they come."""
    for fields, args in (({"mac": form}, ""), ({"runtimeConfig": {"mac": form}}, ""), ({}, f"MAC={form}")):
        assert conf(fields, args=args, command=command).mac == "02:ab:00:00:10:01"


@pytest.mark.parametrize("form", ["03-AB-00-00-10-01", "0000.0000.0000", "FF-FF-FF-FF-FF-FF"])
def test_a_mac_is_unicast_in_every_form(form: str) -> None:
    assert refused({"mac": form}).msg.startswith(f'mac: "{form}" is ')


NOTHING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("interface", "source", "device", "mode", "mac", "addressing", "vlanProtocol", "deviceID"), (None, "")
    ),
    **dict.fromkeys(("mtu", "vlan", "queues", "bcqueuelen"), (None, 0, 0.0)),
    **dict.fromkeys(("owner", "group", "handover", "promisc", "allmulti", "type", "pciBusID"), (None,)),
    **dict.fromkeys(("ipam", "dns", "capabilities", "runtimeConfig", "prevResult", "cniVersions"), (None,)),
    "vlanPriority": (None, 0),
}
"""The values that mean "not given": 0 is root as an owner or a group."""


@pytest.mark.parametrize("called_as", ["vmtap", "macvtap"])
@pytest.mark.parametrize("key", NOTHING)
def test_nothing_is_not_given(key: str, called_as: str) -> None:
    plain = conf({"type": called_as}, called_as=called_as)
    for value in NOTHING[key]:
        fields = {"type": called_as, key: value}
        if key == "type":
            assert conf(fields, called_as=called_as).type == called_as
            continue
        parsed = conf(fields, called_as=called_as)
        assert dataclasses.replace(parsed, raw=plain.raw) == plain
        assert parsed.raw == BASE | fields  # the delegate gets it as it came


def test_every_field_may_be_null() -> None:
    """But the name, which must be given."""
    keys = schema.load("netconf")["properties"].keys() - {"name"}
    assert conf(dict.fromkeys(keys)).cni_version == "0.1.0"


@pytest.mark.parametrize("where", ["mac", "deviceID"])
@pytest.mark.parametrize("value", [None, ""])
def test_nothing_in_runtime_config(where: str, value: str | None) -> None:
    given_ = {"mac": A, "deviceID": "aMvp1"}
    parsed = conf(given_ | {"runtimeConfig": {"mac": B, "deviceID": "bMvp2"} | {where: value}})
    assert (parsed.mac, parsed.device_id) == ((A, "bMvp2") if where == "mac" else (B, "aMvp1"))


def test_an_owner_of_0_is_root() -> None:
    for called_as in ("vmtap", "macvtap"):
        parsed = conf({"owner": 0, "group": 0, "mtu": 0}, called_as=called_as)
        assert (parsed.owner, parsed.group, parsed.mtu) == (0, 0, None)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("mtu", "1500", "an integer from 68 to 65535, without quotes: 1500"),
        ("vlan", "100", "an integer from 1 to 4094, without quotes: 100"),
        ("promisc", "true", "true or false, without quotes: true"),
        ("owner", "0", "an integer from 0 to 4294967294, without quotes: 0"),
    ],
)
def test_a_number_in_quotes(key: str, value: str, hint: str) -> None:
    assert refused({key: value}).msg == f"{key}: {json.dumps(value)} is not allowed; give {hint}"


@pytest.mark.parametrize("value", ["99999", "1e999", "NaN", "x", "[[[", "9" * 5000])
def test_no_number_in_quotes(value: str) -> None:
    assert refused({"mtu": value}).msg.endswith("give an integer from 68 to 65535")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("master", "give source"),
        ("lowerDevice", "give source"),
        ("plugins", "NAME.conflist"),
        ("vlanId", 'did you mean "vlan"?'),
        ("VLAN_ID", 'did you mean "vlan"?'),
        ("vlanQoS", '"vlanPriority"'),
        ("linkInContainer", "leave it out"),
        ("isGateway", "leave it out"),
        ("bridge", "give the Linux bridge as source"),
        ("multiQueue", "queues"),
        ("min_tx_rate", "policy file has it, as minTxRate"),
    ],
)
def test_a_foreign_word_names_ours(key: str, hint: str) -> None:
    error = refused({key: "x"})
    assert error.code == spec.UNSUPPORTED_FIELD
    assert error.msg.startswith(f'{key}: unknown key, its value is "x"; ')
    assert hint in error.msg


def test_foreign_words_are_none_of_ours() -> None:
    ours = {key.lower() for key in schema.load("netconf")["properties"]}
    assert not ours & foreign.NETCONF.keys()
    entry = schema.load("policy")["properties"]["interfaces"]["items"]["properties"]
    assert not {key.lower() for key in entry} & foreign.POLICY.keys()
    assert all(key == key.lower() for key in (*foreign.NETCONF, *foreign.POLICY))


def test_mac_of_cni_args_has_the_shape_of_one() -> None:
    assert refused({}, args="MAC=nonsense").code == spec.INVALID_ENVIRONMENT


@pytest.mark.parametrize(
    ("fields", "device"),
    [
        ({}, None),
        ({"deviceID": "aMvp1"}, "aMvp1"),
        ({"deviceID": "aMvp1", "runtimeConfig": {"deviceID": "bMvp2"}}, "bMvp2"),
        (
            {"deviceID": "aMvp1", "capabilities": {"mac": True}, "runtimeConfig": {"deviceID": "bMvp2"}},
            "aMvp1",
        ),
    ],
)
def test_device_id(fields: dict[str, Any], device: str | None) -> None:
    assert conf(fields).device_id == device


def test_cni_args() -> None:
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=vm;K8S_POD_NAME=vm;X=a=b"
    assert netconf.arguments(args) == {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": "ns",
        "K8S_POD_NAME": "vm",
        "X": "a=b",
    }


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("rubbish", '"rubbish"'),
        ("MAC", '"MAC"'),
        ("=x", '"=x"'),
        ("IP=10.0.0.1;", '""'),
        ("IgnoreUnknown=perhaps", "1, true, 0 or false"),
        ("K8S_POD_NAMES=x", 'did you mean "K8S_POD_NAME"?'),
        ("IgnoreUnknown=0;x=y", '"x"'),
        ("IgnoreUnknown=false;x=y", "IgnoreUnknown=1 lets it pass"),
    ],
)
def test_cni_args_are_refused(args: str, text: str) -> None:
    error = refused({}, args=args)
    assert error.code == spec.INVALID_ENVIRONMENT
    assert error.msg.startswith("CNI_ARGS: ")
    assert text in error.msg
    assert conf({}, args=args, command="DEL").mac is None


@pytest.mark.parametrize("value", ["1", "true", "True", "TRUE"])
def test_ignore_unknown(value: str) -> None:
    assert netconf.arguments(f"x=y;IgnoreUnknown={value}")["x"] == "y"


@pytest.mark.parametrize(
    ("value", "attachments"),
    [
        (None, None),
        ([], set()),
        ([{"containerID": "a", "ifname": "net1"}, {"containerID": "b", "ifname": "eth0", "x": 1}],
         {("a", "net1"), ("b", "eth0")}),
    ],
)  # fmt: skip
def test_valid_attachments(value: Any, attachments: Any) -> None:
    assert conf({netconf.VALID_ATTACHMENTS: value}, command="GC").valid_attachments == attachments


@pytest.mark.parametrize("value", [{}, "x", [1], [{"containerID": "a"}], [{"containerID": 1, "ifname": "a"}]])
def test_malformed_valid_attachments_are_never_none_valid(value: Any) -> None:
    error = refused({netconf.VALID_ATTACHMENTS: value}, command="GC")
    assert error.code == spec.INVALID_NETWORK_CONFIG
    assert error.msg.startswith(netconf.VALID_ATTACHMENTS)


@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_cleaning_up_tolerates_what_add_refuses(command: str) -> None:
    fields = {
        "modee": 1,
        "mode": "nonsense",
        "mtu": "x",
        "mac": "01:00:00:00:00:00",
        "queues": 0,
        "prevResult": "x",
        "ipam": {"type": "host-local"},
        "interface": "dataplane",
    }
    assert refused(fields).code == spec.UNSUPPORTED_FIELD
    parsed = conf(fields, args="rubbish;MAC=x", command=command)
    assert (parsed.mode, parsed.mtu, parsed.mac, parsed.queues) == (None, None, None, 1)
    assert parsed.prev_result is None
    assert (parsed.ipam, parsed.interface) == ({"type": "host-local"}, "dataplane")
    assert parsed.raw == BASE | fields


def test_called_as_macvtap() -> None:
    fields = {"type": "macvtap", "deviceID": "dataplaneMvp12", "mtu": 1400, "promiscMode": True}
    parsed = conf(fields, called_as="macvtap")
    assert (parsed.type, parsed.device_id, parsed.mtu) == ("macvtap", "dataplaneMvp12", 1400)
    assert (parsed.promisc, parsed.owner, parsed.group) == (True, 107, 107)


def test_called_as_macvtap_keeps_what_is_given() -> None:
    parsed = conf({"owner": 0, "group": 5, "promisc": True}, called_as="macvtap")
    assert (parsed.promisc, parsed.owner, parsed.group) == (True, 0, 5)
    assert conf({}, called_as="macvtap").promisc is False
