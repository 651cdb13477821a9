"""The lossy codecs: a scale for each head's vector of a token, and one byte for each of its values.

Encoded form of an object of v vectors of d values:  v scales, float32;  then v * d bytes.

    int8    scale = max|x| / 127    byte = round(x / scale), two's complement
    fp8     scale = max|x| / 448    byte = x / scale as float16, then as E4M3, ties to even

E4M3, of OCP's 8-bit floating point specification, has 4 bits of exponent and 3 of mantissa.  A vector of
zeros, or of nothing larger than 6e-36, has scale 0.  Arithmetic is float32 throughout; rounding by
way of float16 is part of the definition, so that every processor gives the same bytes.  What a vector loses
is bounded by its own largest value: 1/254 of it for int8, and 1/16 of each value or 2**-10 / 448 of the
largest for fp8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.errors import GeometryError
from kvtier.geometry import SCALE_BYTES
from kvtier.gpu.tensors import Bytes

Dtype: TypeAlias = Literal["bf16", "fp16", "fp32"]
Floats: TypeAlias = npt.NDArray[np.float32]

_LARGEST = {"int8": 127.0, "fp8": 448.0}
# Vectors that are converted together: their float32 form stays in a core's cache.
_VALUES_AT_ONCE = 1 << 16
_DTYPES: dict[str, Dtype] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
DTYPES = frozenset(_DTYPES.values())


@dataclass(frozen=True, slots=True)
class Values:
    """What a pool's rows are made of: vectors of `vector` values of one head."""

    dtype: Dtype
    vector: int

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return 4 if self.dtype == "fp32" else 2

    def encoded_bytes(self, exact_bytes: int) -> int:
        """Bytes of the lossy form of that many exact bytes."""
        vectors = exact_bytes // (self.itemsize * self.vector)
        return vectors * (SCALE_BYTES + self.vector)


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over values: squares of what was lost, and of what was there."""

    error_squares: float = 0.0
    value_squares: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.error_squares + other.error_squares, self.value_squares + other.value_squares)

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of the values; 0 where all values are 0."""
        return float(np.sqrt(self.error_squares / self.value_squares)) if self.value_squares else 0.0


def dtype_of(name: str) -> Dtype | None:
    """The codecs' name of a numpy or torch dtype; None for one that they do not take."""
    return _DTYPES.get(name.rpartition(".")[2])


def encode(exact: Bytes, values: Values, codec: str, into: Bytes) -> Loss:
    """Encode an object; answers what was lost.

    exact: uint8 [n], whole vectors.  into: uint8 [values.encoded_bytes(n)].  Raises GeometryError for other
    lengths and for values that are not finite; then `into` may hold anything.
    """
    scales, bytes_ = _parts(exact.nbytes, into, values)
    loss = Loss()
    step = max(1, _VALUES_AT_ONCE // values.vector)
    width = values.itemsize * values.vector
    for first in range(0, len(scales), step):
        rows = slice(first, first + step)
        real = _to_float(exact[first * width : (first + step) * width], values)
        largest = np.abs(real).max(axis=1)
        if not np.isfinite(largest).all():
            raise GeometryError(
                "the KV holds values that are not finite", fix="park it with fidelity 'exact'"
            )
        np.divide(largest, np.float32(_LARGEST[codec]), out=scales[rows])
        # Where all is 0, or too small to be divided by, nothing is kept.
        tiny = scales[rows] < np.finfo(np.float32).tiny
        scales[rows][tiny] = 0.0
        inverse = np.where(tiny, np.float32(1.0), scales[rows])
        bytes_[rows] = _to_byte(np.where(tiny[:, None], np.float32(0.0), real / inverse[:, None]), codec)
        lost = real - _from_byte(bytes_[rows], codec) * scales[rows, None]
        loss += Loss(_squares(lost), _squares(real))
    return loss


def decode(encoded: Bytes, values: Values, codec: str, into: Bytes) -> None:
    """Decode an object. Lengths as in `encode`; raises GeometryError for others."""
    scales, bytes_ = _parts(into.nbytes, encoded, values)
    step = max(1, _VALUES_AT_ONCE // values.vector)
    width = values.itemsize * values.vector
    for first in range(0, len(scales), step):
        rows = slice(first, first + step)
        real = _from_byte(bytes_[rows], codec) * scales[rows, None]
        into[first * width : (first + step) * width] = _to_bytes(real, values)


def _parts(exact_bytes: int, encoded: Bytes, values: Values) -> tuple[Floats, Bytes]:
    width = values.itemsize * values.vector
    if exact_bytes % width or encoded.nbytes != values.encoded_bytes(exact_bytes):
        raise GeometryError(f"{exact_bytes} bytes of KV do not become {encoded.nbytes} bytes")
    vectors = exact_bytes // width
    scales = encoded[: vectors * SCALE_BYTES].view(np.float32)
    return scales, encoded[vectors * SCALE_BYTES :].reshape(vectors, values.vector)


def _squares(of: Floats) -> float:
    return float(np.einsum("ij,ij->", of, of, dtype=np.float64))


def _to_float(raw: Bytes, values: Values) -> Floats:
    if values.dtype == "fp32":
        real: Floats = raw.view(np.float32)
    elif values.dtype == "fp16":
        real = raw.view(np.float16).astype(np.float32)
    else:
        real = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return real.reshape(-1, values.vector)


def _to_bytes(real: Floats, values: Values) -> Bytes:
    flat = np.ascontiguousarray(real).ravel()
    if values.dtype == "fp32":
        return flat.view(np.uint8)
    if values.dtype == "fp16":
        # A value at the end of float16's range may round beyond it.
        limit = np.float32(np.finfo(np.float16).max)
        return np.clip(flat, -limit, limit).astype(np.float16).view(np.uint8)
    bits = flat.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16).view(np.uint8)


def _to_byte(scaled: Floats, codec: str) -> Bytes:
    if codec == "int8":
        return np.rint(scaled).clip(-127, 127).astype(np.int8).view(np.uint8)
    codes: Bytes = _e4m3_of_half()[scaled.astype(np.float16).view(np.uint16)]
    return codes


def _from_byte(raw: Bytes, codec: str) -> Floats:
    if codec == "int8":
        return raw.view(np.int8).astype(np.float32)
    return _float_of_e4m3()[raw]


@cache
def _float_of_e4m3() -> Floats:
    """The value of each byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    table = np.where(code & 128, -size, size).astype(np.float32)
    table[[127, 255]] = np.nan
    return table


@cache
def _e4m3_of_half() -> Bytes:
    """The nearest byte of each float16, ties to even, what is larger than 448 as 448."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    sizes = _float_of_e4m3()[:127].astype(np.float64)
    size = np.minimum(np.nan_to_num(np.abs(halves), nan=0.0, posinf=448.0), 448.0)
    above = np.searchsorted(sizes, size).clip(0, 126)
    below = np.maximum(above - 1, 0)
    up, down = sizes[above] - size, size - sizes[below]
    even_above = above % 2 == 0
    nearest = np.where((up < down) | ((up == down) & even_above), above, below)
    nearest = np.where(size == sizes[above], above, nearest)
    codes: Bytes = (nearest | np.where(np.signbit(halves), 128, 0)).astype(np.uint8)
    return codes
