"""Which layers of a restore are in place, over all its batches: so a prefill can wait layer by layer.

An event says that a layer's copies have ended, not that the bytes are right: that is what the receipt says.
So a prefill may run ahead of the receipt, but what it computed counts only if the receipt is ok.  That is
safe because nothing is copied any more once a layer was told to be there: a batch that failed is tried again
only if nobody was told of a layer yet.  Where the caller's process copies, told is who asked.  Where the GPU
service copies, it keeps these books and pushes what is complete; the caller's own know only what arrived.
Runs in tests against a fake device; not run on a GPU yet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvtier.errors import CopiesHang, GeometryError
from kvtier.gpu.engine import CopyItem, Reached, StreamEvent
from kvtier.gpu.layout import PoolLayout
from kvtier.waiting import wait_until

Handle = Callable[[object], int]
Push = Callable[[int, Sequence[StreamEvent]], None]
# For who waits before it is known until when the restore may take.
LIMIT_S = 60.0


def _same(stream: object) -> int:
    assert isinstance(stream, int)
    return stream


class LayerEvents:
    """Of one restore. Any thread may call. handle: of a stream as its framework has it.

    push: called once for each layer as soon as all its copies are queued, with the events that they end by;
    from any thread, it must neither raise nor wait.  Everyone counts as told of that layer from then on.
    limit_s: time.monotonic() by which the restore is over, whatever happens, unless its device hangs.
    """

    def __init__(self, layout: PoolLayout, handle: Handle = _same, push: Push | None = None) -> None:
        self.limit_s = time.monotonic() + LIMIT_S
        self._push = push
        self._members = [group.layers for group in layout.groups]
        count = sum(len(layers) for layers in self._members)
        self._handle = handle
        self._pending = [0] * count
        self._events: list[list[StreamEvent]] = [[] for _ in range(count)]
        self._arrived: set[int] = set()
        self._changed = threading.Condition()
        self._sealed = False
        self._told = False
        self._failed = False

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def told(self) -> bool:
        """Whether anybody was told of a layer, so that nothing more may be copied."""
        return self._told

    # -- what the engine does

    def begin(self, items: Iterable[CopyItem], last: bool) -> LayerBatch | None:
        """A batch is to be copied; None where that must not be. last: no other is to come after it."""
        with self._changed:
            if self._failed or self._told:
                self._fail()
                return None
            layers = {layer for item in items for layer in self._members[item.group]}
            for layer in layers:
                self._pending[layer] += 1
            self._sealed = last
            self._tell()
            return LayerBatch(self, layers)

    def arrived(self, layer: int, event: StreamEvent) -> None:
        """The GPU service says that the layer is in place after the event. Raises GeometryError."""
        if not 0 <= layer < len(self):
            raise GeometryError(f"there is no layer {layer} in a pool of {len(self)}")
        with self._changed:
            self._arrived.add(layer)
            self._events[layer] = [event]
            self._changed.notify_all()

    def end(self, ok: bool) -> None:
        """The receipt is there: all layers are in place, or none will be told of any more."""
        with self._changed:
            if not ok:
                self._fail()
            elif not self._failed:
                self._pending = [0] * len(self._pending)
                self._sealed = True
                # All are reached, and those of another process may end with its mapping.
                self._events = [[] for _ in self._pending]
            self._changed.notify_all()

    def _queued(self, layer: int, event: StreamEvent) -> None:
        with self._changed:
            self._pending[layer] -= 1
            self._events[layer].append(event)
            self._tell()
            self._changed.notify_all()

    def _tell(self) -> None:
        """Push what is complete. Holds the lock."""
        if self._push is None:
            return
        for layer in range(len(self)):
            if layer not in self._arrived and self._complete(layer):
                self._arrived.add(layer)
                self._told = True
                self._push(layer, self._events[layer])

    def _batch_failed(self, layers: Iterable[int]) -> None:
        with self._changed:
            for layer in layers:
                self._pending[layer] -= 1
            # It is tried again, or the receipt comes; until then it is not known that all is queued.
            self._sealed = False
            if self._told:
                self._fail()

    def _fail(self) -> None:
        self._failed = True
        self._changed.notify_all()

    # -- what the caller asks

    def ready(self, layer: int) -> bool:
        """Whether the layer's bytes are in place. Does not wait. Raises TierUnavailable."""
        with self._changed:
            if not self._complete(layer) or not all(event.done() for event in self._events[layer]):
                return False
            self._told = True
            return True

    def wait(self, layer: int, stream: object, timeout_s: float | None) -> bool:
        """Make the stream wait for the layer; the caller waits only until its copies are queued.

        False when they are not queued within the time, or never will be.  timeout_s: None waits until the
        restore is over.  Raises TierUnavailable; CopiesHang when it should be over and is not.
        """
        handle = self._handle(stream)
        with self._changed:
            self._await(layer, self._until(timeout_s), timeout_s is None)
            if not self._complete(layer):
                return False
            self._told = True
            events = list(self._events[layer])
        for event in events:
            event.wait(handle)
        return True

    def synchronize(self, layer: int, timeout_s: float | None) -> bool:
        """Wait for the layer. As wait()."""
        until_s = self._until(timeout_s)
        with self._changed:
            self._await(layer, until_s, timeout_s is None)
        # A device's own wait for an event knows no bound.
        ended = wait_until(lambda: self._failed or self.ready(layer), until_s - time.monotonic())
        if timeout_s is None and not ended:
            raise self._hangs(layer)
        return self.ready(layer)

    def _until(self, timeout_s: float | None) -> float:
        return self.limit_s if timeout_s is None else time.monotonic() + timeout_s

    @staticmethod
    def _hangs(layer: int) -> CopiesHang:
        return CopiesHang(
            f"the copies of layer {layer} have not ended long after the restore's deadline",
            fix="take the pages for used until the receipt is there; if it never is, end the process",
        )

    def _await(self, layer: int, until_s: float, over: bool) -> None:
        """Until the layer's copies are queued or never will be. over: the restore is over by then."""
        left_s = max(0.0, until_s - time.monotonic())
        known = self._changed.wait_for(lambda: self._failed or self._complete(layer), left_s)
        if over and not known:
            raise self._hangs(layer)

    def _complete(self, layer: int) -> bool:
        there = layer in self._arrived or (self._sealed and not self._pending[layer])
        return there and not self._failed


class LayerBatch:
    """One batch of a restore: on_layer goes into it, ended() is called after it."""

    def __init__(self, events: LayerEvents, layers: Iterable[int]) -> None:
        self._all = events
        self._left = set(layers)

    def on_layer(self, layer: int, event: StreamEvent) -> None:
        """See CopyBatch."""
        self._left.discard(layer)
        self._all._queued(layer, event)

    def ended(self, ok: bool) -> None:
        """The batch was answered. Engines without streams told nothing before."""
        left, self._left = self._left, set()
        if not ok:
            self._all._batch_failed(left)
            return
        for layer in left:
            self._all._queued(layer, Reached())


@dataclass(frozen=True, slots=True)
class LayerReady:
    """One layer of a restore as an event.

    timeout_s: None waits until the restore is over; CopiesHang is raised when it should be and is not.
    """

    layer: int
    _all: LayerEvents

    def done(self) -> bool:
        """Whether the layer's bytes are in place."""
        return self._all.ready(self.layer)

    def wait(self, stream: object = None, timeout_s: float | None = None) -> bool:
        """Make a stream wait for it. See RestoreHandle.wait_on."""
        return self._all.wait(self.layer, stream, timeout_s)

    def synchronize(self, timeout_s: float | None = None) -> bool:
        """Wait for it. False when it does not come."""
        return self._all.synchronize(self.layer, timeout_s)
