"""An engine on a fake device with a pool of one of `pool_cases`, for the tests of the CUDA engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.ways import Way, always
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult, Direction
from kvtier.gpu.pool import Binding
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.pool_cases import Slots


def small(way: Way, slot_bytes: int = 8192, ahead_bytes: int = 1 << 20, slots: int = 2) -> Settings:
    """Settings under which small batches fill staging, and wait for it."""
    return Settings(always(way), slots, slot_bytes, ahead_bytes)


class Rig:
    """device, slots and an engine. tensors: the pool's memory."""

    def __init__(
        self, settings: Settings, tensors: Sequence[Any], *, seed: int = 0, nbytes: int = 1 << 20
    ) -> None:
        self.device = FakeDevice(seed)
        self.slots = Slots(nbytes)
        for tensor in tensors:
            self.device.adopt(flat(tensor))
        self.engine = CudaCopyEngine(self.device, self.slots, [self.slots.bytes], settings=settings)

    def move(
        self,
        direction: Direction,
        binding: Binding,
        items: Sequence[CopyItem],
        verify: bool = True,
        **more: Any,
    ) -> CopyResult:
        """Copy, wait, and answer; the slots are touched as a reader of the answer would."""
        results: list[CopyResult] = []

        def on_done(result: CopyResult) -> None:
            # Whoever is told may use the slots at once, and give the pages to somebody else.
            for item in items:
                self.device.look(self.slots.view(item.address, item.nbytes), writes=direction == "scatter")
            results.append(result)

        self.engine.submit(CopyBatch("j", 0, direction, binding, tuple(items), verify, **more), on_done)
        assert self.engine.wait_idle(30)
        return results[0]

    def close(self) -> None:
        """Close, and see that nothing is left behind and nothing was done in the wrong order."""
        self.engine.close()
        assert not self.device.gpu.fault, self.device.gpu.fault
        assert not self.device.races, self.device.races[:3]
        assert not self.device.leaks(), self.device.leaks()


def flat(tensor: Any) -> np.ndarray[Any, Any]:
    """All the memory that a tensor is a view of, as bytes."""
    root = tensor
    while isinstance(root.base, np.ndarray):
        root = root.base
    memory: np.ndarray[Any, Any] = root.reshape(-1).view(np.uint8)
    return memory
