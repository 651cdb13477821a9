"""`raw`: bytes as they are."""

from __future__ import annotations

import numpy as np

from kvtier.disk.codecs.codec import Bytes
from kvtier.errors import CorruptObject


class Raw:
    """Never makes anything smaller."""

    name = "raw"

    def check_installed(self) -> None:
        """See Codec."""

    def encode(self, payload: Bytes, item_bytes: int, into: Bytes) -> int | None:
        """See Codec."""
        return None

    def decode(self, stored: Bytes, into: Bytes) -> None:
        """See Codec."""
        if stored.nbytes != into.nbytes:
            raise CorruptObject(f"{stored.nbytes} raw bytes for a payload of {into.nbytes}")
        np.copyto(into, stored)
