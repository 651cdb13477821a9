"""Tells workers of a restore's layers where the GPU service copies, so that a prefill may follow them.

A layer is told of when all its copies are queued, by an event of this process that the worker's streams wait
for.  From then on the worker may compute with it, so nothing is copied into these pages again: a batch that
would, which is one that failed and is tried again from elsewhere, is refused, and the restore ends not ok.
That is remembered until the node says that the restore is over, with the next batch of that worker, or the
worker leaves: so what is remembered is bounded by the restores that were under way at its last batch.  What
failed before any layer was told of is tried again, unless the rest of the restore came in between: its
layers are told of without what is missing, and only the refusal makes the receipt say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from kvtier.errors import KvtierError, TierUnavailable
from kvtier.gpu.engine import CopyBatch, Reached, StreamEvent
from kvtier.gpu.layers import LayerBatch, LayerEvents
from kvtier.messages.tiers import Copy, LayerQueued

Relay = Callable[..., int]
Tell = Callable[[str, LayerQueued], None]


@dataclass(slots=True)
class _Restore:
    """A restore, and its batches that run."""

    layers: LayerEvents
    running: dict[int, LayerBatch] = field(default_factory=dict)


class RestoreLayers:
    """Of all restores that this process carries out. tell: from any thread, must neither raise nor wait."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        # Those that have a batch under way.
        self._restores: dict[tuple[str, str], _Restore] = {}
        # By worker, those that somebody was told of, and of which the node may send another batch.
        self._told: dict[str, set[str]] = {}

    def begin(self, copy: Copy, batch: CopyBatch, relay: Relay | None) -> CopyBatch:
        """The batch, which tells of its layers where the worker asked for that; `over` is to be called then.

        relay: see EventRing; None for pools whose engine has no streams.  Raises KvtierError for one that
        would write what the worker was told is in place.
        """
        if not copy.layers or copy.direction != "scatter":
            return batch
        name = (copy.worker, copy.job)
        if copy.job in self._told.get(copy.worker, ()):
            raise _written_again()
        if name not in self._restores:
            push = partial(self._push, copy.worker, copy.request, relay)
            self._restores[name] = _Restore(LayerEvents(batch.binding.layout, push=push))
        restore = self._restores[name]
        part = restore.layers.begin(batch.items, copy.last)
        if part is None:
            raise _written_again()
        restore.running[copy.batch] = part
        return replace(batch, on_layer=part.on_layer)

    def over(self, worker: str, job: str, number: int, ok: bool) -> None:
        """The batch was answered, or never began. Unknown ones are no error."""
        restore = self._restores.get((worker, job))
        if restore is None:
            return
        part = restore.running.pop(number, None)
        if part is not None:
            part.ended(ok)
        if restore.running:
            return
        del self._restores[worker, job]
        if restore.layers.told:
            self._told.setdefault(worker, set()).add(job)

    def ended(self, worker: str, jobs: Sequence[str]) -> None:
        """The node sends no batch of these any more, and has heard of the end of each that it sent."""
        self._told.get(worker, set()).difference_update(jobs)

    def leave(self, worker: str) -> None:
        """The worker is gone, and none of its copies runs."""
        for name in [name for name in self._restores if name[0] == worker]:
            del self._restores[name]
        self._told.pop(worker, None)

    def clear(self) -> None:
        """No worker is there any more."""
        self._restores.clear()
        self._told.clear()

    def _push(
        self, worker: str, request: int, relay: Relay | None, layer: int, events: Sequence[StreamEvent]
    ) -> None:
        to_come = [event for event in events if not isinstance(event, Reached)]
        # A device that is lost tells of nothing: the receipt says how the restore ended.
        with suppress(TierUnavailable):
            number = relay(*to_come) if relay is not None and to_come else None
            self._tell(worker, LayerQueued(request=request, layer=layer, event=number))


def _written_again() -> KvtierError:
    return KvtierError("a layer that the worker may compute with by now would be written again")
