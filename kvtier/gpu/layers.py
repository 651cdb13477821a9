"""Which layers of a restore are in place, over all its batches: so a prefill can wait layer by layer.

    ready = LayerEvents(layout, rows)               rows that each layer is to get, as the plan says
    CopyBatch(..., on_layer=ready.note(items))      for every batch of the restore
    ready.wait(layer, stream, timeout_s)            before the layer's attention

Events say that bytes are in place, not that they are right: that is what the restore's receipt says.  So a
prefill may run ahead of the receipt, but no token leaves it before the receipt is there, and none if it
restored less than was planned.  Runs in tests against a fake device; not run on a GPU yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from kvtier.gpu.engine import CopyItem, StreamEvent
from kvtier.gpu.layout import PoolLayout


class LayerEvents:
    """Any thread may call. rows: for each layer of the pool, how many rows are going to be copied."""

    def __init__(self, layout: PoolLayout, rows: Sequence[int]) -> None:
        self._group_of = {layer: g for g, group in enumerate(layout.groups) for layer in group.layers}
        self._missing = list(rows)
        self._events: list[list[StreamEvent]] = [[] for _ in rows]
        self._changed = threading.Condition()
        self._over = False

    def note(self, items: Iterable[CopyItem]) -> Callable[[int, StreamEvent], None]:
        """What to give as `on_layer` to the batch with these items."""
        rows: dict[int, int] = {}
        for item in items:
            rows[item.group] = rows.get(item.group, 0) + item.tokens - item.first_valid

        def on_layer(layer: int, event: StreamEvent) -> None:
            with self._changed:
                self._missing[layer] -= rows.get(self._group_of[layer], 0)
                self._events[layer].append(event)
                self._changed.notify_all()

        return on_layer

    def end(self) -> None:
        """Nothing more is going to be queued: who still waits for a layer is told that it does not come."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait(self, layer: int, stream: int, timeout_s: float) -> bool:
        """Make the stream wait for the layer; the caller waits only until its copies are queued.

        False when they are not queued within the time, or never will be.  Raises TierUnavailable.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._missing[layer] <= 0, timeout_s)
            if self._missing[layer] > 0:
                return False
            events = list(self._events[layer])
        for event in events:
            event.wait(stream)
        return True

    def queued(self) -> tuple[int, ...]:
        """Layers whose copies are all queued."""
        with self._changed:
            return tuple(layer for layer, missing in enumerate(self._missing) if missing <= 0)
