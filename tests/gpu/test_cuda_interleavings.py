"""Any mix of parks, restores, cancels and failing calls on the CUDA engine: answered once, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.checksum import checksum
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.ways import WAYS, always
from kvtier.gpu.describe import paged
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult
from kvtier.gpu.pool import Pool
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_slots import BLOCK, LAYERS, NBYTES, PAGES, P, Slots

LANES = PAGES // P // 4
"""Conversations that share neither pages nor slots: each has 16 pages and four slots."""
FAILING = ("copy", "copy_batch", "launch", "record", "wait")


class World:
    """An engine, a pool whose content is known, and what every answer said."""

    def __init__(self, seed: int, how: Settings) -> None:
        self.device, self.slots = FakeDevice(seed), Slots()
        rng = np.random.default_rng(seed)
        shape = (2, PAGES, P, 2, 8)
        self.tensors = [rng.integers(0, 65536, shape, dtype=np.uint16) for _ in range(LAYERS)]
        for tensor in self.tensors:
            self.device.adopt(tensor.reshape(-1).view(np.uint8))
        layout = paged([(t,) for t in self.tensors], "kv page token head dim", block_tokens=BLOCK)
        self.pool = Pool(layout, self.tensors)
        self.truth = [tensor.copy() for tensor in self.tensors]
        self.engine = CudaCopyEngine(self.device, self.slots, [self.slots.bytes], settings=how)
        self.answers: dict[int, list[CopyResult]] = {}
        self.sums: dict[int, int] = {}

    def items(self, lane: int, count: int) -> tuple[CopyItem, ...]:
        first = 4 * lane
        return tuple(
            CopyItem(0, BLOCK * i, BLOCK, 0, first + i, 1, (0, (first + i) * NBYTES), NBYTES)
            for i in range(count)
        )

    def stored(self, lane: int, block: int) -> bytes:
        pages = slice(16 * lane + 4 * block, 16 * lane + 4 * block + 4)
        return b"".join(half[pages].tobytes() for tensor in self.truth for half in tensor)

    def submit(self, number: int, lane: int, direction: str, count: int, more: dict[str, Any]) -> None:
        items = self.items(lane, count)
        if direction == "scatter":
            known = [self.sums.get(item.slot_id) for item in items]
            items = tuple(replace(i, checksum=c) for i, c in zip(items, known, strict=True) if c is not None)
        heard = self.answers[number] = []

        def on_done(result: CopyResult) -> None:
            heard.append(result)
            for item, total in zip(items, result.checksums, strict=True):
                if total is not None:
                    self.sums[item.slot_id] = total

        binding = self.pool.bind(range(16 * lane, 16 * lane + 16))
        batch = CopyBatch(f"job-{lane}", number, direction, binding, items, **more)  # type: ignore[arg-type]
        self.engine.submit(batch, on_done)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_mix_of_calls(data: st.DataObject) -> None:
    """Each conversation's batches wait for each other, as the schedule sees to; conversations do not."""
    draw: Callable[..., Any] = data.draw
    way = draw(st.sampled_from(WAYS))
    slot_bytes, ahead = (
        draw(st.sampled_from([4096, 8192, 1 << 15])),
        draw(st.sampled_from([1, 1 << 14, 1 << 20])),
    )
    world = World(
        draw(st.integers(0, 1 << 16)), Settings(always(way), draw(st.integers(1, 3)), slot_bytes, ahead)
    )
    try:
        for number in range(draw(st.integers(1, 8))):
            lane = draw(st.integers(0, LANES - 1))
            action = draw(st.sampled_from(["gather", "gather", "scatter", "scatter", "cancel", "fail"]))
            if action == "cancel":
                world.engine.cancel(f"job-{lane}")
            elif action == "fail":
                world.device.fail(draw(st.sampled_from(FAILING)), draw(st.integers(0, 6)))
            else:
                if f"job-{lane}" in world.engine.busy_jobs():
                    assert world.engine.wait_idle(30)
                layered = {"on_layer": lambda layer, event: None} if draw(st.booleans()) else {}
                world.submit(number, lane, action, draw(st.integers(1, 4)), layered)
        assert world.engine.wait_idle(30)
    finally:
        world.engine.close()
    assert all(len(heard) == 1 for heard in world.answers.values())
    for slot_id, total in world.sums.items():
        wanted = world.stored(slot_id // 4, slot_id % 4)
        assert total == checksum(wanted)
        assert world.slots.bytes[slot_id * NBYTES : (slot_id + 1) * NBYTES].tobytes() == wanted
    # Whatever was restored, in part or whole, is what had been there.
    assert all((t == truth).all() for t, truth in zip(world.tensors, world.truth, strict=True))
    assert not world.device.races and not world.device.gpu.fault and not world.device.leaks()
