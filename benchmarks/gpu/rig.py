"""What every part of the GPU benchmarks needs: a device, an arena, a pool that fills the device, engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvtier.errors import TierUnavailable
from kvtier.geometry import EXACT
from kvtier.gpu.cuda.cupy_device import CudaDevice
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.describe import cross_layer, paged
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult, Direction, StreamEvent
from kvtier.gpu.pool import Binding, Pool
from kvtier.gpu.tensors import DeviceBytes, TensorSpec
from kvtier.host import ArenaView
from kvtier.host.arena import Arena
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_gpu import FakeGpu

WAIT_S = 120.0
RANDOM_BYTES = 64 << 20


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The default is Llama-3-8B; DRY is for a machine without a GPU."""

    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_tokens: int = 16
    block_tokens: int = 256
    tokens: int = 32768
    batch_items: int = 1
    copy_bytes: tuple[int, ...] = (1 << 20, 16 << 20, 64 << 20, 256 << 20)
    pieces: tuple[int, ...] = tuple(4096 << i for i in range(12))
    way_bytes: int = 128 << 20
    rounds: int = 5
    contexts: tuple[int, ...] = (2048, 8192, 32768, 65536)
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    vocabulary: int = 32000
    seconds: float = 1.5

    @property
    def row_bytes(self) -> int:
        """K or V of one token in one layer."""
        return self.kv_heads * self.head_dim * 2

    @property
    def conversation_bytes(self) -> int:
        """KV of all tokens."""
        return self.tokens * self.layers * 2 * self.row_bytes


DRY = Sizes(
    layers=4,
    kv_heads=2,
    head_dim=8,
    page_tokens=4,
    block_tokens=16,
    tokens=64,
    batch_items=2,
    copy_bytes=(4096, 65536),
    pieces=(4096, 16384),
    way_bytes=1 << 18,
    rounds=1,
    contexts=(16, 32),
    hidden=32,
    inner=64,
    heads=4,
    vocabulary=64,
    seconds=0.02,
)


class Bench:
    """A device and the sizes for it. dry: a fake device at tiny sizes, whose times mean nothing."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.sizes = DRY if dry else Sizes()
        self.device: Device = FakeDevice(gpu=FakeGpu(detect=False)) if dry else CudaDevice(0)
        self.device.enter()

    def facts(self) -> dict[str, Any]:
        """What the results are of."""
        free, whole = self.device.memory_info()
        return {
            "device": self.device.name,
            "device_bytes": whole,
            "free_bytes": free,
            "context_bytes": self.device.context_bytes,
            "can_batch": self.device.can_batch,
            "dry": self.dry,
        }

    @contextmanager
    def arena(self, nbytes: int, objects: int) -> Iterator[ArenaView]:
        """Host memory as the daemon makes it, with slots 0 .. objects-1 in use."""
        made = Arena([-(-nbytes // 4096) * 4096], max_slots=max(objects, 1))
        try:
            for slot in range(objects):
                made.publish(slot, 1)
            yield made
        finally:
            made.close()

    @contextmanager
    def memory(self, nbytes: int) -> Iterator[DeviceBytes]:
        """Device memory, full of random bytes."""
        address = self.device.allocate(nbytes)
        try:
            self._fill(address, nbytes)
            yield DeviceBytes(address, nbytes, self.device.location, None)
        finally:
            self.device.free(address)

    def finite(self, memory: DeviceBytes) -> None:
        """Fill it with random bytes that are finite numbers as fp16: all exponents are small."""
        self._fill(memory.address, memory.nbytes, mask=0x3F)

    def _fill(self, address: int, nbytes: int, mask: int = 0xFF) -> None:
        size = min(RANDOM_BYTES, nbytes)
        pinned, stream = self.device.pinned(size), self.device.stream()
        pinned[:] = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8) & np.uint8(mask)
        for at in range(0, nbytes, size):
            self.device.copy(address + at, int(pinned.ctypes.data), min(size, nbytes - at), stream)
        mark(self.device, stream).synchronize()
        self.device.destroy_stream(stream)
        self.device.free_pinned(pinned)

    @contextmanager
    def engine(self, arena: ArenaView, nbytes: int, **settings: Any) -> Iterator[CudaCopyEngine]:
        """An engine over the arena's first sub-arena."""
        mapping = arena.view((0, 0), -(-nbytes // 4096) * 4096)
        made = CudaCopyEngine(self.device, arena, [mapping], settings=Settings(**settings))
        try:
            yield made
        finally:
            made.close()


@dataclass
class Conversation:
    """Where a conversation of `sizes.tokens` tokens lies, and its items in the arena from `first_slot` on."""

    binding: Binding
    items: list[CopyItem]
    nbytes: int


def pool_over(memory: DeviceBytes, sizes: Sizes, across: bool) -> Pool:
    """Twice as many pages as a conversation needs: tensors for K and V by layer, or pages of all layers."""
    pages = pool_pages(sizes)
    page_bytes = sizes.page_tokens * sizes.row_bytes
    if across:
        shape = (pages, sizes.layers, 2, sizes.page_tokens, sizes.row_bytes)
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        spec = TensorSpec(shape, strides, 1, "uint8", memory.address)
        layout = cross_layer(spec, "page layer kv token dim", block_tokens=sizes.block_tokens)
        return Pool(layout, [memory])
    specs = [
        TensorSpec(
            (pages, sizes.page_tokens, sizes.row_bytes),
            (page_bytes, sizes.row_bytes, 1),
            1,
            "uint8",
            memory.address + i * pages * page_bytes,
        )
        for i in range(2 * sizes.layers)
    ]
    layout = paged(
        list(zip(specs[::2], specs[1::2], strict=True)), "page token dim", block_tokens=sizes.block_tokens
    )
    parts = [DeviceBytes(s.address, pages * page_bytes, memory.location, memory) for s in specs]
    return Pool(layout, parts)


def pool_pages(sizes: Sizes) -> int:
    """Pages of the pool."""
    return 2 * sizes.tokens // sizes.page_tokens


def conversations(pool: Pool, sizes: Sizes, count: int = 2) -> list[Conversation]:
    """Conversations that share no page, each on pages in random order; slots one after the other."""
    order = np.random.default_rng(7).permutation(pool_pages(sizes))
    pages = sizes.tokens // sizes.page_tokens
    object_bytes = sizes.conversation_bytes // (sizes.tokens // sizes.block_tokens)
    blocks = sizes.tokens // sizes.block_tokens
    made = []
    for n in range(count):
        items = [
            CopyItem(
                0,
                i * sizes.block_tokens,
                sizes.block_tokens,
                0,
                n * blocks + i,
                1,
                (0, (n * blocks + i) * object_bytes),
                object_bytes,
            )
            for i in range(blocks)
        ]
        binding = pool.bind(order[n * pages : (n + 1) * pages])
        made.append(Conversation(binding, items, sizes.conversation_bytes))
    return made


@dataclass
class Job:
    """Batches on their way. wait() answers when they are done."""

    left: int
    results: list[CopyResult]
    over: threading.Event
    begun_s: float
    ended_s: float = 0.0

    def wait(self) -> float:
        """Seconds from the first submit to the last answer. Raises TierUnavailable when an item failed."""
        if not self.over.wait(WAIT_S):
            raise TierUnavailable(f"a job took longer than {WAIT_S} s")
        failed = [result.failed[0] for result in self.results if result.failed]
        if failed:
            raise TierUnavailable(f"an item failed: {failed[0][1]}")
        return self.ended_s - self.begun_s

    def wait_checksums(self) -> list[int | None]:
        """Of all items, in order, once they are done."""
        self.wait()
        return [c for result in sorted(self.results, key=lambda r: r.batch) for c in result.checksums]


def start(
    engine: CudaCopyEngine,
    direction: Direction,
    what: Conversation,
    sizes: Sizes,
    *,
    verify: bool = False,
    on_layer: Callable[[int, StreamEvent], None] | None = None,
    fidelity: str = EXACT,
) -> Job:
    """Submit a conversation in batches, as the daemon does."""
    parts = [what.items[i : i + sizes.batch_items] for i in range(0, len(what.items), sizes.batch_items)]
    job = Job(len(parts), [], threading.Event(), time.perf_counter())
    lock = threading.Lock()

    def on_done(result: CopyResult) -> None:
        with lock:
            job.results.append(result)
            job.left -= 1
            if not job.left:
                job.ended_s = time.perf_counter()
                job.over.set()

    for n, part in enumerate(parts):
        batch = CopyBatch("bench", n, direction, what.binding, tuple(part), verify, on_layer=on_layer)
        engine.submit(replace(batch, fidelity=fidelity), on_done)
    return job


def with_checksums(what: Conversation, sums: Sequence[int | None]) -> Conversation:
    """The conversation, to be restored with these checked."""
    items = [replace(item, checksum=c) for item, c in zip(what.items, sums, strict=True)]
    return Conversation(what.binding, items, what.nbytes)
