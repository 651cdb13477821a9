"""What the codec kernels of kv_copy.cu do, in Python, by way of kvtier.gpu.quantise."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtier.checksum import PIECE_BYTES, piece_sum
from kvtier.errors import GeometryError
from kvtier.gpu.cuda.device import TILE_BYTES
from kvtier.gpu.cuda.shapes import PLANE
from kvtier.gpu.cuda.work import LOSS
from kvtier.gpu.quantise import Values, decode, encode
from kvtier.testing.fake_device_gpu import DeviceFault, Range, memory_at
from kvtier.testing.fake_device_kernels import read_segments, runs

_DTYPES = ("bf16", "fp16", "fp32")
Ranges = tuple[list[Range], list[Range], list[Range]]


def run(kernel: str, address: int, tiles: int, base: int, more: tuple[int, int]) -> Ranges:
    """(ranges in the pool, ranges read, ranges written elsewhere). Raises DeviceFault."""
    segment = read_segments(address, 1, tiles, PIECE_BYTES if kernel == "hash" else TILE_BYTES)[0]
    lo, hi = int(segment["lo"]), int(segment["hi"])
    there = (base + int(segment["linear"]), base + int(segment["linear"]) + hi - lo)
    if kernel == "hash":
        return _hash(segment, there, lo, more[1])
    values = Values(_DTYPES[more[0] >> 32 & 255], more[0] & 0xFFFFFFFF)  # type: ignore[arg-type]
    codec = ("int8", "fp8")[more[0] >> 40]
    exact = _exact_bytes(segment)
    if values.encoded_bytes(exact) < hi:
        raise DeviceFault(f"{exact} bytes of KV have no encoded byte {hi}")
    if kernel == "encode":
        return _encode(segment, there, (values, codec, exact), more[1])
    return _decode(segment, there, (values, codec, exact), more[1])


def _exact_bytes(segment: Any) -> int:
    planes = memory_at(int(segment["planes"]), int(segment["plane_count"]) * PLANE.itemsize).view(PLANE)
    last = planes[-1]
    return int(last["out"]) + int(last["strips"]) * int(last["row_bytes"]) * int(segment["rows"])


def _hash(segment: Any, there: Range, lo: int, results: int) -> Ranges:
    if lo % PIECE_BYTES:
        raise DeviceFault(f"byte {lo} is not the beginning of a piece")
    at = results + 8 * int(segment["item"])
    result = memory_at(at, 8).view(np.uint64)
    found = piece_sum(memory_at(there[0], there[1] - there[0]), lo // PIECE_BYTES, there[1] - there[0])
    result += np.uint64(found % (1 << 64))
    return [], [there], [(at, at + 8)]


def _encode(segment: Any, there: Range, form: tuple[Values, str, int], losses: int) -> Ranges:
    values, codec, exact = form
    found = list(runs(segment, 0, exact))
    raw = np.concatenate([memory_at(here, n) for here, _, n in found])
    lo, hi = int(segment["lo"]), int(segment["hi"])
    encoded = np.zeros(values.encoded_bytes(exact), np.uint8)
    at = losses + LOSS.itemsize * int(segment["item"])
    loss = memory_at(at, LOSS.itemsize).view(LOSS)
    try:
        lost = encode(raw, values, codec, encoded)
    except GeometryError:
        loss["not_finite"] = 1
    else:
        # What each part of an object adds is not told apart here: the first one answers for all.
        if not lo:
            loss["error_squares"] += lost.error_squares
            loss["value_squares"] += lost.value_squares
    memory_at(there[0], hi - lo)[:] = encoded[lo:hi]
    return [(here, here + n) for here, _, n in found], [], [there, (at, at + LOSS.itemsize)]


def _decode(segment: Any, there: Range, form: tuple[Values, str, int], scales: int) -> Ranges:
    values, codec, exact = form
    lo, hi = int(segment["lo"]), int(segment["hi"])
    vectors = exact // (values.itemsize * values.vector)
    encoded = np.zeros(values.encoded_bytes(exact), np.uint8)
    encoded[: 4 * vectors] = memory_at(scales, 4 * vectors)
    begin = max(lo, 4 * vectors)
    if begin >= hi:
        return [], [there], []
    encoded[begin:hi] = memory_at(there[0] + begin - lo, hi - begin)
    raw = np.zeros(exact, np.uint8)
    decode(encoded, values, codec, raw)
    first, last = ((at - 4 * vectors) * values.itemsize for at in (begin, hi))
    written = []
    for here, at, nbytes in runs(segment, first, last):
        memory_at(here, nbytes)[:] = raw[at : at + nbytes]
        written.append((here, here + nbytes))
    return written, [there, (scales, scales + 4 * vectors)], []
