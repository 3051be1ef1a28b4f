"""GC: end the attachments of a network that its runtime does not list as valid."""

from __future__ import annotations

from cni.attach.delete import attempt, end_for, raise_all
from cni.state.claims import Claims

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni.attach.call import Call
    from cni.errors import CniError
    from cni.state.record import Record


def collect(call: Call) -> None:
    """End this network's attachments that are not among the valid ones (SPEC section 4 "GC").

    Without a list of valid attachments none is ended. The delegate is run in any case. Raises CniError after every
    attachment has been tried.
    """
    failed: list[CniError] = []
    if (valid := call.conf.valid_attachments) is not None:
        store = call.node.store
        indexes: dict[str, list[int]] = {id: [] for id in store.recorded()}
        for number, id in store.reserved():
            indexes.setdefault(id, []).append(number)
        for id in Claims(
            store.folder
        ).reserved():  # read last: a claim's index is reserved before its file is there
            indexes.pop(id, None)
        for id, numbers in sorted(indexes.items()):
            failed += attempt(_collect, call, valid, id, numbers)
    if delegate := call.delegate_after_add(None):
        failed += attempt(delegate.run, "GC")
    raise_all(failed)


def _collect(call: Call, valid: frozenset[tuple[str, str]], id: str, numbers: Iterable[int]) -> None:
    """End the attachment of that id, unless it is valid, another network's or a resource claim's.

    numbers: the indexes that it holds.
    """

    def stays(record: Record) -> bool:
        return (
            record.claim or record.network != call.conf.name or (record.container_id, record.ifname) in valid
        )

    store = call.node.store
    # Looked at without its lock first: an ADD of another network may hold that for long.
    seen = store.load(id)
    if seen and stays(seen):
        return
    with store.locked(id, yield_turn=call.yield_turn):
        record = store.load(id)
        if record is None:  # an ADD was killed before it wrote one
            store.forget_id(id, *numbers)
        elif not stays(record):
            raise_all(end_for(call, record))
