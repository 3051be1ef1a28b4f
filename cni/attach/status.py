"""STATUS: would an ADD of this config fail now for want of something on the node?"""

from __future__ import annotations

from cni import lower
from cni.attach import plan as plans
from cni.errors import CniError
from cni.spec import PLUGIN_NOT_AVAILABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.attach.call import Call
    from cni.config.policy import Grant


def status(call: Call, grant: Grant | None) -> None:
    """Raises CniError 50 if an ADD would fail now. grant: None if only the kubelet's device will name an interface."""
    delegate = call.delegate()
    try:
        if delegate:
            delegate.find()
        if grant:
            plan = plans.decide_for(call, grant, call.source(grant))
            if plan.lower:
                lower.available(str(grant.source), plan.lower)
        call.node.store.prepare()
    except CniError as error:
        raise CniError(PLUGIN_NOT_AVAILABLE, error.msg, error.details) from error
    if delegate:
        delegate.run("STATUS")
