"""driver.py: it ends at once, though the API server does not answer."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from functools import partial
from typing import TYPE_CHECKING

from cni.agent import settings as agent_settings
from cni.agent.dra import driver as module
from cni.agent.dra import status
from cni.agent.dra.api import Api
from cni.agent.dra.driver import Driver
from cni.agent.metrics import Registry
from cni.agent.policies import Policies
from cni.state.store import Store
from tests.unit.agent.dra.test_prepare import record
from tests.unit.state.test_claims import CLAIM, DEVICE
from tests.waiting import LIMIT, until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_stop_waits_for_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit of time ends the calls, or the wait for the threads."""
    for each in (module, status):
        monkeypatch.setattr(each, "_STOP_SECONDS", 1e6)
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("x")
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", account / "ca.crt")
    monkeypatch.setattr(module, "Api", partial(Api, account=str(account), seconds=1e6))
    monkeypatch.setattr("cni.agent.dra.api._CONNECT_SECONDS", 1e6)
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(silent.getsockname()[1]))
    store = Store(tmp_path / "run")
    store.prepare()
    with silent, tempfile.TemporaryDirectory(prefix="kubelet-") as kubelet:
        settings = agent_settings.load(
            [f"--run={tmp_path}/run", "--node=n", f"--kubelet={kubelet}/device-plugins"]
        )
        policies = Policies(f"{tmp_path}/interfaces.yaml", None, required=False)
        driver = Driver(settings, policies, store, Registry(), end=lambda *_: None, allocated=None)
        driver._claims.save(CLAIM)
        driver.start()
        driver.report(CLAIM, [record(CLAIM, DEVICE)])
        until(lambda: len(driver._api._lines) == 2, "the slices and the status are not being sent")
        stopping = threading.Thread(target=driver.stop, daemon=True)
        stopping.start()
        stopping.join(LIMIT)
        assert not stopping.is_alive()
