"""Numbers of 2 or 4 bytes taken apart into planes: all first bytes, all second bytes, and so on.

The plane with sign and exponent takes few values and can be coded; the mantissa's are noise.  Shifts and
narrowing copies run in vector registers, at two to four times the rate of strided copies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtier.disk.codecs.codec import Bytes

WIDTHS = (1, 2, 4)


class Planes:
    """Splits and merges up to `numbers` numbers of `item_bytes`; has scratch memory of that size."""

    def __init__(self, item_bytes: int, numbers: int) -> None:
        self._dtype = np.dtype(f"<u{item_bytes}")
        self._wide: npt.NDArray[np.unsignedinteger] = np.empty(numbers, dtype=self._dtype)

    def split(self, numbers: Bytes, plane: int, into: Bytes) -> None:
        """Write byte `plane`, counted from the lowest, of each number into `into`."""
        items = numbers.view(self._dtype)
        if plane:
            wide = self._wide[: items.size]
            np.right_shift(items, 8 * plane, out=wide)
            items = wide
        np.copyto(into, items, casting="unsafe")

    def merge(self, planes: list[Bytes], into: Bytes) -> None:
        """Put the numbers together from their planes, the lowest bytes first."""
        items = into.view(self._dtype)
        wide = self._wide[: items.size]
        np.copyto(wide if len(planes) > 1 else items, planes[-1])
        for number in reversed(range(len(planes) - 1)):
            np.left_shift(wide, 8, out=wide)
            np.bitwise_or(wide, planes[number], out=wide if number else items)
