"""The drop, read back from the kernel about the program that was run after it."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni import spec
from cni.errors import CniError
from cni.launcher import NOT_PERMITTED, privilege
from cni.launcher.privilege import User

CLEAN = """\
Uid:	107	107	107	107
Gid:	108	108	108	108
Groups:	 
CapInh:	0000000000000000
CapPrm:	0000000000000000
CapEff:	0000000000000000
CapBnd:	0000000000000000
CapAmb:	0000000000000000
NoNewPrivs:	1
Seccomp:	2
"""  # noqa: W291 - as the kernel writes it


def test_users() -> None:
    nobody = pwd.getpwnam("nobody")
    assert privilege.parse_user("107:108") == User(107, 108)
    assert privilege.parse_user("nobody") == User(nobody.pw_uid, nobody.pw_gid)
    assert privilege.parse_user(str(nobody.pw_uid)) == User(nobody.pw_uid, nobody.pw_gid)
    assert privilege.parse_user("nobody:daemon") == User(nobody.pw_uid, 1)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ":",
            "0",
            "root",
            "0:0",
            "0:107",
            "107:0",
            "nobody:root",
            "107:",
            ":107",
            "no-such-user",
            "107:no-such",
        ),
        *(
            "4294967295:107",
            "107:4294967295",
            "4294967296:1",
            "-1:107",
            "+107:107",
            "1_0:107",
            "\uff11\uff10\uff17:107",
        ),
        *("1" * 5000, "3999999999", "107:107:107", "0x6b:107", " 107:107"),
    ],
)
def test_bad_users(text: str) -> None:
    with pytest.raises(CniError, match="--user") as caught:
        privilege.parse_user(text)
    assert caught.value.code == spec.INVALID_ENVIRONMENT


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 2**32 - 2), st.integers(1, 2**32 - 2))
def test_numbers_are_taken_as_they_are(uid: int, gid: int) -> None:
    assert privilege.parse_user(str(User(uid, gid))) == User(uid, gid)


def test_environment_keeps_what_a_program_needs_and_nothing_of_cni() -> None:
    kept = {"PATH": "/bin", "TERM": "xterm", "LANG": "C", "LC_ALL": "C", "TZ": "UTC", "TMPDIR": "/scratch"}
    lost = {"CNI_ARGS": "x", "VMTAP_RUN": "/s", "HOME": "/root", "LD_PRELOAD": "x.so", "KUBECONFIG": "/k"}
    assert privilege.environment(kept | lost) == kept


def test_no_excess_in_a_clean_status() -> None:
    assert privilege.excess(CLEAN.splitlines(), User(107, 108)) == []


@pytest.mark.parametrize(
    ("clean", "dirty"),
    [
        ("Uid:\t107\t107\t107\t107", "Uid:\t107\t107\t0\t107"),
        ("Gid:\t108\t108\t108\t108", "Gid:\t108\t108\t108\t0"),
        ("Groups:\t ", "Groups:\t0 "),
        *(
            (f"{name}:\t{0:016x}", f"{name}:\t{1 << 12:016x}")
            for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        ),
        ("NoNewPrivs:\t1", "NoNewPrivs:\t0"),
        ("Seccomp:\t2", "Seccomp:\t0"),
        ("CapBnd:\t0000000000000000\n", ""),
    ],
)
def test_each_excess_is_seen(clean: str, dirty: str) -> None:
    [found] = privilege.excess(CLEAN.replace(clean, dirty).splitlines(), User(107, 108))
    assert found.startswith(clean.partition(":")[0])


DROP = """
import os, sys
from cni.launcher import privilege
wanted = [os.open(name, os.O_RDONLY) for name in ("/etc/passwd", "/etc/group", "/etc/hostname")]
os.dup2(wanted[0], 900, inheritable=True)  # one that is not for the program, as a careless caller leaves it
[ours] = privilege.place([wanted[1], wanted[0]], [wanted[2]])
assert ours == 5 and not os.get_inheritable(ours)
privilege.drop(privilege.User(107, 108))
os.execve("/bin/sh", ["sh", "-c", "echo there; umask; read end"], {"A": "b"})
"""

# What a caller may leave behind, and setresuid(2) alone does not take away.
GENEROUS = (
    *("setpriv", "--groups", "4,27", "--inh-caps", "+net_admin", "--ambient-caps", "+net_admin"),
    *("--securebits", "+no_setuid_fixup", "--"),
)


def test_the_program_has_its_fds_and_no_privilege() -> None:
    given_fd = os.open("/etc/passwd", os.O_RDONLY)
    try:
        with subprocess.Popen(
            [*GENEROUS, sys.executable, "-c", DROP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[given_fd],
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == b"there\n"
            assert int(process.stdout.readline(), 8) == 0o077
            proc = Path(f"/proc/{process.pid}")
            fds = {int(path.name): path.readlink() for path in (proc / "fd").iterdir()}
            status = (proc / "status").read_text()
    finally:
        os.close(given_fd)
    assert set(fds) == {0, 1, 2, 3, 4}
    assert (fds[3], fds[4]) == (Path("/etc/group"), Path("/etc/passwd"))
    assert privilege.excess(status.splitlines(), User(107, 108)) == []


DROP_AS_USER = """
import os
from cni.launcher import privilege
os.setresgid(108, 108, 0)
os.setresuid(107, 107, 0)  # and every capability stays, by the securebits
privilege.drop(privilege.User(107, 108))
os.execve("/bin/cat", ["cat", "/proc/self/status"], {})
"""


def test_who_is_not_root_loses_what_can_be_lost() -> None:
    """Saved ids of root's, ambient and all other capabilities; not groups and bounding set, which take CAP_*."""
    said = subprocess.run(
        [*GENEROUS, sys.executable, "-c", DROP_AS_USER], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert privilege.excess(said, User(107, 108), was_root=False) == []
    kept = [line.partition(":")[0] for line in privilege.excess(said, User(107, 108))]
    assert kept == ["Groups", "CapBnd"]


def test_place_moves_fds_whose_numbers_cross() -> None:
    """3 and 4 change places: neither may overwrite the other on the way."""
    code = """
import os
from cni.launcher import privilege
os.closerange(3, 64)
a, b = os.open("/etc/passwd", os.O_RDONLY), os.open("/etc/group", os.O_RDONLY)
assert (a, b) == (3, 4)
privilege.place([4, 3])
print(os.readlink("/proc/self/fd/3"), os.readlink("/proc/self/fd/4"))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == ["/etc/group", "/etc/passwd"]


@pytest.mark.parametrize("missing", ["cap_setuid", "cap_setgid", "cap_setpcap"])
def test_fails_closed_without_the_capabilities_to_lose_all(missing: str) -> None:
    code = """
from cni.errors import CniError
from cni.launcher import privilege
try:
    privilege.drop(privilege.User(107, 108))
except CniError as error:
    print(error.code)
"""
    limited = [
        "setpriv",
        f"--bounding-set=-{missing.removeprefix('cap_')}",
        "--inh-caps=-all",
        "--",
        sys.executable,
    ]
    said = subprocess.run([*limited, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == [str(NOT_PERMITTED)]
