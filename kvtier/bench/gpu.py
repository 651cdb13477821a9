"""The CUDA copy engine on the GPU that is there: pool pages to host memory and back. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import numpy as np

from kvtier.bench.copies import run
from kvtier.bench.lines import Line, alternate, rate_line
from kvtier.bench.link import DIRECTIONS, Link
from kvtier.bench.llama import BLOCK_BYTES, BLOCK_TOKENS, scattered_pool
from kvtier.bench.memory import faulted
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import cuda_engine
from kvtier.gpu.cuda.measure import ScratchSlots
from kvtier.gpu.cuda.memory import PinnedArena
from kvtier.gpu.engine import CopyEngine
from kvtier.gpu.tensors import Bytes, DeviceBytes

RANDOM_BYTES = 32 << 20
# What copies that do not end may still write to.
_IN_USE: list[ExitStack] = []


def gpu_copies(device: Device, nbytes: int, rounds: int, settings: Settings | None = None) -> Iterator[Line]:
    """Parks and restores of Llama-3-8B's KV in scattered pages, checksums included, against plain copies.

    Takes twice `nbytes` of the GPU and of host memory.  settings: without them the ways are measured first.
    Raises TierUnavailable; when copies hang, none of that memory is given back before the process ends.
    """
    blocks = nbytes // BLOCK_BYTES
    size = blocks * BLOCK_BYTES
    device.enter()
    with ExitStack() as undo:
        # The link has memory of its own: what lies in slots and pages must stay what was copied there.
        host = faulted(2 * size, huge=True)
        pinned = PinnedArena(device, [host])
        undo.callback(pinned.close)
        there = device.allocate(2 * size)
        undo.callback(device.free, there)
        _fill(device, there, size)
        link = Link(device, int(host.ctypes.data) + size, there + size)
        undo.callback(link.close)
        place = cuda_engine(device, settings)
        engine = place(ScratchSlots(host), pinned)
        undo.callback(_end, engine, undo)
        pool, pages = scattered_pool(DeviceBytes(there, size, device.location, None), blocks)
        binding = pool.bind(pages, tokens=blocks * BLOCK_TOKENS)
        sums = run(engine, binding, blocks, "gather", True, [None] * blocks)
        for direction in DIRECTIONS:
            work = partial(run, engine, binding, blocks, direction, True, sums)
            took = alternate([partial(link.seconds, [direction], size)], work, rounds)
            name = f"engine {direction}, scattered 16-token pages, with checksum"
            yield rate_line(name, size, *took, limit_is="pinned copy", device=device.name)


def _end(engine: CopyEngine, undo: ExitStack) -> None:
    """Close the engine; while it still copies, the memory that it copies to is kept."""
    if not engine.close():
        _IN_USE.append(undo.pop_all())


def _fill(device: Device, address: int, nbytes: int) -> None:
    """With noise."""
    memory: Bytes = device.pinned(min(RANDOM_BYTES, nbytes))
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.nbytes, dtype=np.uint8)
    stream = device.stream()
    for at in range(0, nbytes, memory.nbytes):
        part = min(memory.nbytes, nbytes - at)
        device.copy(address + at, int(memory.ctypes.data), part, stream)
    mark(device, stream).synchronize()
    device.destroy_stream(stream)
    device.free_pinned(memory)
