"""Slots, items and single copies for the tests of the CUDA engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.errors import TierUnavailable
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult
from kvtier.gpu.pool import Pool

P, PAGES, BLOCK, LAYERS = 4, 64, 16, 4
NBYTES = 2 * LAYERS * BLOCK * 2 * 8 * 2


class Slots:
    """Slots of NBYTES each; `on_generation` runs at each look at a generation."""

    def __init__(self) -> None:
        self.bytes = np.zeros(16 * NBYTES, np.uint8)
        self.generations = [1] * 16
        self.on_generation: Callable[[int], None] = lambda slot_id: None

    def view(self, address: tuple[int, int], nbytes: int) -> npt.NDArray[np.uint8]:
        if address[0]:
            raise TierUnavailable("there is one arena")
        return self.bytes[address[1] : address[1] + nbytes]

    def generation(self, slot_id: int) -> int:
        self.on_generation(slot_id)
        return self.generations[slot_id]


def items(count: int, sums: tuple[int | None, ...] = ()) -> tuple[CopyItem, ...]:
    return tuple(
        CopyItem(0, i * BLOCK, BLOCK, 0, i, 1, (0, i * NBYTES), NBYTES, sums[i] if sums else None)
        for i in range(count)
    )


def run(engine: CudaCopyEngine, batch: CopyBatch) -> CopyResult:
    results: list[CopyResult] = []
    engine.submit(batch, results.append)
    assert engine.wait_idle(20)
    assert len(results) == 1
    return results[0]


def parked(engine: CudaCopyEngine, pool: Pool, count: int) -> tuple[Any, tuple[int | None, ...]]:
    binding = pool.bind(range(4 * count))
    result = run(engine, CopyBatch("park", 0, "gather", binding, items(count)))
    assert result.ok and result.bytes == count * NBYTES and result.seconds > 0
    return binding, result.checksums
