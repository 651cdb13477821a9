"""Measuring a device: how fast each way moves pieces of a size. Not run on a GPU yet.

Everything goes through the engine itself, so a rate counts what its Python costs too.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np

from kvtier.errors import TierUnavailable
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.ways import FITTED_PIECES, Way, WayTable, always, fit_table
from kvtier.gpu.describe import paged
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult, Direction
from kvtier.gpu.pool import Binding, Pool
from kvtier.gpu.tensors import Bytes, DeviceBytes, TensorSpec

FIT_BYTES = 64 << 20
FIT_OBJECTS = 4
ROUNDS = 3
WAIT_S = 60.0


class ScratchSlots:
    """Plain memory as slots: nobody else's, so every generation is 1."""

    def __init__(self, memory: Bytes) -> None:
        self.memory = memory

    def view(self, address: tuple[int, int], nbytes: int) -> Bytes:
        """See SlotMemory."""
        return self.memory[address[1] : address[1] + nbytes]

    def generation(self, slot_id: int) -> int:
        """See SlotMemory."""
        return 1


def bind_scratch(
    memory: DeviceBytes, piece_bytes: int, object_bytes: int, objects: int
) -> tuple[Binding, list[CopyItem]]:
    """Objects of single pieces, scattered over the memory in a fixed random order, and their items."""
    pages = memory.nbytes // piece_bytes
    block = object_bytes // piece_bytes
    spec = TensorSpec((pages, 1, piece_bytes), (piece_bytes, piece_bytes, 1), 1, "uint8", memory.address)
    layout = paged([(spec,)], "page token dim", block_tokens=block)
    table = np.random.default_rng(0).permutation(pages)[: block * objects]
    items = [
        CopyItem(0, n * block, block, 0, n, 1, (0, n * object_bytes), object_bytes) for n in range(objects)
    ]
    return Pool(layout, [memory]).bind(table), items


def copy_once(
    engine: CudaCopyEngine, direction: Direction, binding: Binding, items: Sequence[CopyItem], verify: bool
) -> tuple[float, CopyResult]:
    """(seconds from submit to answer, the answer). Raises TierUnavailable when an item failed."""
    answered = threading.Event()
    results: list[CopyResult] = []

    def on_done(result: CopyResult) -> None:
        results.append(result)
        answered.set()

    begun = time.perf_counter()
    engine.submit(CopyBatch("measure", 0, direction, binding, tuple(items), verify), on_done)
    if not answered.wait(WAIT_S):
        raise TierUnavailable(f"a copy took longer than {WAIT_S} s")
    seconds = time.perf_counter() - begun
    if not results[0].ok:
        raise TierUnavailable(f"a copy failed: {results[0].failed[0][1]}")
    return seconds, results[0]


class WayRates:
    """Scratch memory on both sides, and an engine over it. close() gives everything back."""

    def __init__(self, device: Device, nbytes: int = FIT_BYTES, objects: int = FIT_OBJECTS) -> None:
        self._device = device
        self._objects = objects
        self.nbytes = nbytes
        host = np.zeros(nbytes, np.uint8)
        self._pool = DeviceBytes(device.allocate(nbytes), nbytes, device.location, None)
        try:
            self.engine = CudaCopyEngine(device, ScratchSlots(host), [host])
        except TierUnavailable:
            device.free(self._pool.address)
            raise

    def rate(self, direction: Direction, way: Way, piece_bytes: int) -> float:
        """Bytes a second, the median of some rounds after one that is not counted."""
        self.engine.use(always(way))
        binding, items = bind_scratch(self._pool, piece_bytes, self.nbytes // self._objects, self._objects)
        seconds = [copy_once(self.engine, direction, binding, items, False)[0] for _ in range(ROUNDS + 1)]
        return self.nbytes / statistics.median(seconds[1:])

    def close(self) -> None:
        """End the engine and free the memory, unless a copy hangs in it."""
        if self.engine.close():
            self._device.free(self._pool.address)


def fit(device: Device, pieces: Sequence[int] = FITTED_PIECES, nbytes: int = FIT_BYTES) -> WayTable:
    """The table for this device, measured now: about a quarter of a second. Raises TierUnavailable."""
    rates = WayRates(device, nbytes)
    try:
        return fit_table(rates.rate, pieces=pieces)
    finally:
        rates.close()
