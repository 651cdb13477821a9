"""What kv_copy.cu does, in Python, on the descriptors that the engine wrote: slow, and by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvtier.checksum import PIECE_BYTES, checksum
from kvtier.gpu.cuda.device import TILE_BYTES
from kvtier.gpu.cuda.shapes import PLANE
from kvtier.gpu.cuda.work import SEGMENT
from kvtier.testing.fake_device_gpu import DeviceFault, Range, memory_at


def runs(segment: Any, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
    """(address, offset in the object, bytes) of bytes [lo, hi), row by row."""
    planes = memory_at(int(segment["planes"]), int(segment["plane_count"]) * PLANE.itemsize).view(PLANE)
    size, first, rows = (int(segment[name]) for name in ("page_tokens", "first_row", "rows"))
    pages = -(-(first + rows) // size)
    ids = memory_at(int(segment["ids"]), 4 * pages).view(np.uint32)
    for plane in planes:
        at, row_bytes = int(plane["out"]), int(plane["row_bytes"])
        for page in range(pages):
            begin, end = max(first, page * size), min(first + rows, (page + 1) * size)
            for strip in range(int(plane["strips"])):
                for row in range(begin - page * size, end - page * size):
                    if at < hi and at + row_bytes > lo:
                        address = int(plane["base"]) + int(ids[page]) * int(plane["page_stride"])
                        address += strip * int(plane["strip_stride"]) + row * int(plane["token_stride"])
                        skip, cut = max(0, lo - at), max(0, at + row_bytes - hi)
                        yield address + skip, at + skip, row_bytes - skip - cut
                    at += row_bytes


def read_segments(address: int, count: int, tiles: int, tile_bytes: int) -> Any:
    """The descriptors, once they are consistent. Raises DeviceFault."""
    segments = memory_at(address, count * SEGMENT.itemsize).view(SEGMENT)
    counts = -(-(segments["hi"] - segments["lo"]).astype(np.int64) // tile_bytes)
    begins = np.concatenate([[0], np.cumsum(counts)])
    if (segments["first_tile"] != begins[:-1]).any() or tiles != begins[-1]:
        raise DeviceFault(f"{count} segments with {begins[-1]} tiles, launched for {tiles}")
    return segments


def move(kernel: str, address: int, count: int, tiles: int, base: int) -> tuple[list[Range], list[Range]]:
    """Gather or scatter; (ranges in the pool, ranges outside of it)."""
    pool, linear = [], []
    for segment in read_segments(address, count, tiles, TILE_BYTES):
        lo, hi = int(segment["lo"]), int(segment["hi"])
        for here, at, nbytes in runs(segment, lo, hi):
            there = base + int(segment["linear"]) + at - lo
            target, source = (there, here) if kernel == "gather" else (here, there)
            memory_at(target, nbytes)[:] = memory_at(source, nbytes)
            pool.append((here, here + nbytes))
            linear.append((there, there + nbytes))
    return pool, linear


def sums(address: int, count: int, tiles: int, results: int) -> tuple[list[Range], list[Range]]:
    """Checksums; (ranges in the pool, ranges of results)."""
    read, written = [], []
    for segment in read_segments(address, count, tiles, PIECE_BYTES):
        nbytes = int(segment["hi"])
        found = list(runs(segment, 0, nbytes))
        data = b"".join(memory_at(here, n).tobytes() for here, _, n in found)
        result = memory_at(results + 8 * int(segment["item"]), 8).view(np.uint64)
        result += np.uint64((checksum(data) - nbytes) % (1 << 64))
        read += [(here, here + n) for here, _, n in found]
        written.append((results + 8 * int(segment["item"]), results + 8 * int(segment["item"]) + 8))
    return read, written
