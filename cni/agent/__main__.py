"""vmtapd: puts the agent's parts together, and takes them apart again on SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from logging import ERROR, INFO, WARNING

from cni import attachment, plugin
from cni.agent import config, server
from cni.agent import log as logs
from cni.agent.log import log
from cni.agent.policies import Policies
from cni.agent.unlink import Unlinker
from cni.agent.wire import Asked
from cni.errors import CniError
from cni.state import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.agent.config import Config
    from cni.plugin import Response


class Agent:
    """Everything that a request needs and that outlives it."""

    def __init__(self, settings: Config) -> None:
        self.settings = settings
        self.policies = Policies(settings.policy)
        self.unlink: attachment.DeleteLink = Unlinker()

    def answer(self, asked: Asked) -> tuple[Response, bytes]:
        """Carry out one request of the shim."""
        begin = time.monotonic()
        request = plugin.Request(
            env=asked.env,
            stdin=asked.stdin,
            policy=self.settings.policy,
            load_policy=self.policies,
            state=self.settings.run,
            called_as=asked.called_as,
            netns=asked.netns,
            delegate_seconds=self.settings.delegate_seconds,
            delete_link=self.unlink,
        )
        response = plugin.handle(request)
        stderr = b""
        fields: dict[str, object] = {"ms": round((time.monotonic() - begin) * 1000, 2)}
        if response.error:
            stderr = f"{asked.called_as}: {response.error}\n".encode()
            fields |= {"code": response.error.code, "error": str(response.error)}
        log(
            WARNING if response.error else INFO,
            "request",
            command=asked.env.get("CNI_COMMAND"),
            container=asked.env.get("CNI_CONTAINERID"),
            ifname=asked.env.get("CNI_IFNAME"),
            **fields,
        )
        return response, stderr


def main() -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    try:
        settings = config.load(sys.argv[1:])
    except CniError as error:
        print(f"vmtapd: {error}", file=sys.stderr)
        return 64
    logs.start(settings.log_level)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))  # threads inherit it
    try:
        return _run(settings)
    except (CniError, OSError) as error:
        log(ERROR, "cannot start", error=str(error))
        return 1


def _run(settings: Config) -> int:
    Store(settings.run).prepare()
    folder = f"{settings.run}/agent"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    agent = Agent(settings)
    with suppress(CniError):  # it is logged, and every ADD says so
        agent.policies()
    lent = _inherited()
    serving = server.Server(
        lent or server.listen(f"{folder}/cni.sock"),
        agent.answer,
        lambda why: log(WARNING, "refused", why=why),
        lent=lent is not None,
    )
    serving.start()
    _notify("READY=1")
    log(INFO, "ready", socket=f"{folder}/cni.sock")
    number = signal.sigwait((signal.SIGTERM, signal.SIGINT))
    _notify("STOPPING=1")
    log(INFO, "ending", signal=signal.Signals(number).name)
    done = serving.stop(settings.drain_seconds)
    if not done:
        log(WARNING, "requests were still in flight; the reconciler will heal what they leave")
    return 0


def _inherited() -> socket.socket | None:
    """systemd's socket (sd_listen_fds(3)): the first, if it was meant for us."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not int(os.environ.get("LISTEN_FDS", "0")):
        return None
    os.set_inheritable(3, False)  # not for the delegates
    return socket.socket(fileno=3)


def _notify(state: str) -> None:
    """sd_notify(3), where systemd listens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError as error:
            log(WARNING, "systemd does not take notice", error=str(error))


if __name__ == "__main__":
    sys.exit(main())
