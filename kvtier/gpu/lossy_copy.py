"""One object's copy under a lossy codec: the same calls as an exact one, with one unit that is all of it."""

from __future__ import annotations

import threading

import numpy as np

from kvtier.checksum import PIECE_BYTES, piece_sum
from kvtier.gpu.cpu_copy import BlockCopy
from kvtier.gpu.plan import Cut, Plan, Unit
from kvtier.gpu.pool import Binding
from kvtier.gpu.quantise import Loss, Values, decode, encode
from kvtier.gpu.tensors import Bytes

_scratch = threading.local()


class LossyCopy:
    """slot: uint8, the encoded bytes. loss: what the gather lost, once it ran.

    The exact bytes pass through a buffer of the copying thread, as long as the longest object it met: a
    checksum is of the encoded bytes, which are all that is kept.
    """

    __slots__ = ("_binding", "_codec", "_cut", "_group", "_rows", "_slot", "_values", "loss", "plan")

    def __init__(
        self,
        binding: Binding,
        group: int,
        rows: tuple[int, int, int],
        slot: Bytes,
        cut: Cut,
        codec: str,
        values: Values,
    ) -> None:
        """rows: (start, tokens, first_valid), checked."""
        self._binding, self._group, self._rows = binding, group, rows
        self._slot, self._cut, self._codec, self._values = slot, cut, codec, values
        self.plan = Plan((Unit((), 0, slot.nbytes, ()),), slot.nbytes, {})
        self.loss = Loss()

    def gather(self, unit: Unit, hashing: bool) -> int:
        """Copy pool -> slot; answers the sum of its pieces, 0 unless hashing. Raises GeometryError."""
        exact, block = self._exact()
        for part in block.plan.units:
            block.gather(part, False)
        self.loss = encode(exact, self._values, self._codec, self._slot)
        return self._hash() if hashing else 0

    def scatter(self, unit: Unit, hashing: bool) -> int:
        """Copy slot -> pool; answers the sum of its pieces, 0 unless hashing. Raises GeometryError."""
        total = self._hash() if hashing else 0
        exact, block = self._exact()
        decode(self._slot, self._values, self._codec, exact)
        for part in block.plan.units:
            block.scatter(part, False)
        return total

    def hash_piece(self, piece: int) -> int:
        """The hash of one piece of the slot."""
        lo = piece * PIECE_BYTES
        hi = min(lo + PIECE_BYTES, self._slot.nbytes)
        return piece_sum(self._slot[lo:hi], piece, hi - lo)

    def _hash(self) -> int:
        return piece_sum(self._slot, 0, self._slot.nbytes)

    def _exact(self) -> tuple[Bytes, BlockCopy]:
        _, tokens, first_valid = self._rows
        nbytes = (tokens - first_valid) * self._binding.layout.token_bytes(self._group)
        exact = _buffer(nbytes)
        return exact, BlockCopy(self._binding, self._group, self._rows, exact, self._cut)


def _buffer(nbytes: int) -> Bytes:
    held: Bytes | None = getattr(_scratch, "held", None)
    if held is None or held.nbytes < nbytes:
        held = _scratch.held = np.empty(nbytes, np.uint8)
    return held[:nbytes]
