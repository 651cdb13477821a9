"""What a lossless codec of the disk tier promises."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvtier.errors import TierUnavailable

Bytes = npt.NDArray[np.uint8]


class CodecMissing(TierUnavailable):
    """A codec's package is not installed. The stored bytes may be sound, so nothing is quarantined."""


class Codec(Protocol):
    """Makes a payload smaller, and gives exactly its bytes back. Safe from any thread.

    name: as it stands in headers and in the index.
    """

    name: str

    def check_installed(self) -> None:
        """Raise CodecMissing unless the codec's package, if it has one, can be loaded."""
        ...

    def encode(self, payload: Bytes, item_bytes: int, into: Bytes) -> int | None:
        """Write the encoded payload to the front of `into`; answers its length.

        None when it does not fit: then it is not worth encoding, and what `into` holds means nothing.
        item_bytes: width of the numbers in the payload, 1, 2 or 4; of influence on the length alone.
        Raises CodecMissing.
        """
        ...

    def decode(self, stored: Bytes, into: Bytes) -> None:
        """Fill `into`, as long as the payload was, from what `encode` wrote.

        Whatever `stored` holds, no more memory than a small multiple of a piece is taken.  Raises
        CorruptObject when it is not an encoding of a payload of this length, CodecMissing.
        """
        ...
