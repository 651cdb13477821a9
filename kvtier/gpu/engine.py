"""The interface of copy engines: what moves bytes between an engine's pool and slots, asynchronously.

The caller names rows of a bound conversation and slots; the engine decides how.  The CPU engine is one; CUDA
is another behind the same calls.  What holds for each:

- Everything is checked before anything is copied: submit() raises GeometryError, and then nothing happened.
- on_done is called once for each batch, from a thread of the engine's or from cancel()'s caller, and must not
  raise or wait.  After it no copy of that batch runs.
- A slot's generation is checked before and after its copy.  An item that failed is reported by itself.
- On scatter with verify each part of the slot is hashed while it is in cache from its copy, so bytes of a
  corrupt object do reach the pool pages before the item is known to be bad.  That is safe: the pages are
  the caller's, nobody else may read them, and a failed item is reported as not restored, so its rows are
  computed and overwritten.  Checking first would read the slot from memory twice.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.geometry import EXACT
from kvtier.gpu.pool import Binding
from kvtier.gpu.quantise import Loss
from kvtier.gpu.tensors import Bytes

Direction: TypeAlias = Literal["gather", "scatter"]

NO_LOSS = Loss()
# How long an engine that is closed waits for its copies, which are bounded and end soon.
CLOSE_S = 5.0
STALE = "stale"
CORRUPT = "corrupt"
CANCELLED = "cancelled"
ERROR = "error: "


class SlotMemory(Protocol):
    """Where slots are. Both calls from any thread; they may raise KvtierError, OSError or ValueError."""

    def view(self, address: tuple[int, int], nbytes: int) -> Bytes:
        """The slot's memory: uint8, one dimension, writable, shared."""

    def generation(self, slot_id: int) -> int:
        """The slot's generation now."""


@runtime_checkable
class StreamEvent(Protocol):
    """A point in the work of a device's stream. Calls from any thread; they may raise TierUnavailable."""

    def done(self) -> bool:
        """Whether the stream has passed it."""

    def wait(self, stream: int) -> None:
        """Make another stream of the device, named by its handle, wait for it. The caller does not wait."""

    def synchronize(self) -> None:
        """Wait for it."""


class Reached:
    """A point that was passed when it was made: the CPU's memory holds what was written before."""

    __slots__ = ()

    def done(self) -> bool:
        """See StreamEvent."""
        return True

    def wait(self, stream: int) -> None:
        """See StreamEvent."""

    def synchronize(self) -> None:
        """See StreamEvent."""


@dataclass(frozen=True, slots=True)
class CopyItem:
    """One object: rows [first_valid, tokens) of the block at position `start`, and its slot.

    address: (sub-arena, byte offset).  checksum: what the slot's bytes should have; None where not known.
    """

    group: int
    start: int
    tokens: int
    first_valid: int
    slot_id: int
    generation: int
    address: tuple[int, int]
    nbytes: int
    checksum: int | None = None


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """Objects that are copied, answered and cancelled together.

    direction: 'gather' from pool to slots, 'scatter' from slots to pool.  verify: on gather compute
    checksums, on scatter check them; every item then needs one.  priority: lower goes first among batches
    of one direction; scatter goes before gather.  fidelity: 'exact', or the lossy codec of the slots' bytes.

    On engines with streams, which move the batch layer by layer when after_layers or on_layer is given:
    after: nothing in the pool is touched before it.  after_layers: for each layer of the pool the event after
    which its pages may be touched.  on_layer(layer, event): called once for each layer with a part in the
    batch, in ascending order, from a thread of the engine's, when all copies of the layer are queued: the
    layer's bytes are in place after the event.  Whether they are right is known only when on_done says so:
    what was computed from them before is to be thrown away if an item failed.  It must not raise or wait.
    Engines without streams take only events that are done, and tell nothing before on_done.
    """

    job: str
    batch: int
    direction: Direction
    binding: Binding
    items: tuple[CopyItem, ...]
    verify: bool = True
    priority: int = 0
    after: StreamEvent | None = None
    after_layers: tuple[StreamEvent, ...] = ()
    on_layer: Callable[[int, StreamEvent], None] | None = None
    fidelity: str = EXACT


@dataclass(frozen=True, slots=True)
class CopyResult:
    """How a batch ended.

    checksums: one for each item, None where none was computed.  failed: (index of the item, reason), with
    'stale', 'corrupt', 'cancelled' or 'error: ...'.  bytes: of the items that succeeded.  seconds: from the
    first copy to the last.  loss: of a gather under a lossy codec, over the items that succeeded.
    """

    job: str
    batch: int
    ok: bool
    checksums: tuple[int | None, ...]
    failed: tuple[tuple[int, str], ...]
    bytes: int
    seconds: float
    loss: Loss = NO_LOSS


Done: TypeAlias = Callable[[CopyResult], None]


class CopyEngine(ABC):
    """Copies batches in the background. All calls from any thread."""

    @abstractmethod
    def submit(self, batch: CopyBatch, on_done: Done) -> None:
        """Queue a batch. Raises GeometryError, or TierUnavailable once closed; then on_done is not called."""

    @abstractmethod
    def cancel(self, job: str) -> None:
        """Batches of the job that have not begun never will, and are answered before this returns.

        One that runs ends early, in its own time: items not copied by then fail as 'cancelled'.
        """

    @abstractmethod
    def wait_idle(self, timeout_s: float) -> bool:
        """Whether every batch submitted so far was answered within the time."""

    @abstractmethod
    def busy_jobs(self) -> frozenset[str]:
        """Jobs with a batch that is not answered yet."""

    @abstractmethod
    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Cancel what is queued, wait for what runs, end the threads. A closed engine takes no batches.

        False when a copy still runs after the time: it may touch the pool, the slots and the engine's own
        memory, so nothing was given back.  To be called again then; again is no error.
        """


class Place(ABC):
    """A device that pools are on: makes its copy engine, and knows its streams and events.

    location: as pools name it, 'cpu' or 'cuda:0'.  engine: 'cpu' or 'cuda'.  device: the GPU's name, '' for
    none.  All calls from any thread; there may be no engine yet, or none any more.
    """

    location: str
    engine: str
    device: str = ""

    @abstractmethod
    def __call__(self, slots: SlotMemory) -> CopyEngine:
        """An engine that copies between pools here and these slots. Raises KvtierError."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """GPU memory that an engine takes from its beginning, without the process's CUDA context."""

    @abstractmethod
    def stream(self, stream: Any) -> int:
        """The handle of a stream as a framework has it; None is the current one. Raises GeometryError."""

    @abstractmethod
    def mark(self, stream: Any = None) -> StreamEvent:
        """A new event for all that is queued on a stream so far. Raises GeometryError, TierUnavailable."""

    def after(self, stream: Any) -> StreamEvent:
        """As mark(), or what mark() gave before. Raises GeometryError, TierUnavailable."""
        return stream if isinstance(stream, StreamEvent) else self.mark(stream)

    @abstractmethod
    def event(self, event: Any) -> StreamEvent:
        """A framework's own event, recorded already, or what mark() gave. Raises GeometryError."""


def check_batch(batch: CopyBatch) -> None:
    """What every engine demands of a batch. Raises GeometryError."""
    layout = batch.binding.layout
    if batch.direction not in ("gather", "scatter"):
        raise GeometryError(f"no such direction: {batch.direction}")
    for item in batch.items:
        batch.binding.check(item.group, item.start, item.tokens, item.first_valid)
        wanted = layout.stored_bytes(item.group, item.tokens - item.first_valid, batch.fidelity)
        if item.nbytes != wanted:
            raise GeometryError(
                f"an object of {item.tokens} tokens is {wanted} bytes, its slot {item.nbytes}"
            )
        if batch.verify and batch.direction == "scatter" and item.checksum is None:
            raise GeometryError("an object without a checksum cannot be verified")


def start_all(threads: list[threading.Thread]) -> None:
    """Start an engine's threads. Raises TierUnavailable where one cannot be had; those that run are left."""
    for number, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError as error:
            del threads[number:]
            raise TierUnavailable(f"a copy engine gets no thread: {error}") from error
