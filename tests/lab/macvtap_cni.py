"""A stand-in for the program of kubevirt/macvtap-cni: it does the calls below. install() makes the executable.

What its pkg/cni/plugin.go, pkg/util/netlink.go and pkg/util/iface_name.go were read to do, and the stand-in does:
- a cniVersion above 0.4.0 is refused with error code 1 (the library of CNI that it is built with);
- ADD without a deviceID fails; else the link of the deviceID's temporary name is moved from the plugin's namespace into
  CNI_NETNS, renamed to CNI_IFNAME, set up; /dev/tapN is given to 107:107; the result has the link's name, MAC, sandbox;
- an ADD that fails removes the link;
- DEL without CNI_NETNS succeeds, and so does DEL of a link that is gone.
Left out: mtu, promiscMode, owner, group and a MAC in CNI_ARGS, which the benchmark does not use. A missing /dev/tapN is
no fault here, because a test machine's /dev may be no devtmpfs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lab.bench.xxhash import xxh64

OLDEST_REFUSED = (0, 4, 1)


def install(folder: Path) -> Path:
    """Writes the executable into the folder. Returns its path."""
    program = folder / "macvtap"
    program.write_text(
        f"#!{sys.executable}\n"
        f"import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        f"from {__name__} import main\n"
        f"sys.exit(main())\n"
    )
    program.chmod(0o755)
    return program


def main() -> int:
    """One call. Returns the exit status; the result or the error goes to stdout."""
    config = json.load(sys.stdin)
    if tuple(map(int, config["cniVersion"].split("."))) >= OLDEST_REFUSED:
        return _refuse(1, "incompatible CNI versions")
    command, ifname, netns = (os.environ[f"CNI_{name}"] for name in ("COMMAND", "IFNAME", "NETNS"))
    inside = ["nsenter", f"--net={netns}"]
    if command == "DEL":
        if netns:
            _run(*inside, "ip", "link", "del", ifname)
        return 0
    if not (device := config.get("deviceID")):
        return _refuse(999, "deviceID is required")
    link = f"mvt{xxh64(device.encode()) & 0xFFFFFFFFFFFF:012x}"
    done = _run("ip", "link", "set", link, "netns", netns) and _run(
        *inside, "ip", "link", "set", link, "name", ifname
    )
    if not done or not _run(*inside, "ip", "link", "set", ifname, "up"):
        _run("ip", "link", "del", link)
        _run(*inside, "ip", "link", "del", ifname)
        return _refuse(999, f"failed to move {link}")
    [shown] = json.loads(subprocess.check_output([*inside, "ip", "-j", "link", "show", ifname]))
    if (node := Path(f"/dev/tap{shown['ifindex']}")).exists():
        os.chown(node, 107, 107)
    interface = {"name": ifname, "mac": shown["address"], "sandbox": netns}
    print(json.dumps({"cniVersion": config["cniVersion"], "interfaces": [interface], "dns": {}}))
    return 0


def _run(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _refuse(code: int, text: str) -> int:
    print(json.dumps({"code": code, "msg": text}))
    return 1
