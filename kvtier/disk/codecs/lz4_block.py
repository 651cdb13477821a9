"""LZ4 blocks: the fastest of the usual compressors. It finds repetitions, and codes nothing by frequency.

Blocks and not frames, since lengths are known here anyway: no frame headers, and a limit that the
decoder itself holds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from kvtier.disk.codecs.codec import Bytes, CodecMissing
from kvtier.errors import CorruptObject


@cache
def _library() -> Any:
    try:
        import lz4.block  # type: ignore[import-untyped]
    except ImportError as problem:
        raise CodecMissing("the package lz4 is not installed", fix="pip install 'kvtier[disk]'") from problem
    return lz4.block


class Lz4Block:
    """One plane of a piece at a time."""

    def check_installed(self) -> None:
        """See Compressor."""
        _library()

    def compress(self, plane: Bytes) -> bytes:
        """See Compressor."""
        packed: bytes = _library().compress(plane, store_size=False)
        return packed

    def decompress(self, packed: Bytes, nbytes: int) -> bytes:
        """See Compressor."""
        library = _library()
        try:
            plane: bytes = library.decompress(packed, uncompressed_size=nbytes)
        except library.LZ4BlockError as problem:
            raise CorruptObject(f"an LZ4 block cannot be decoded: {problem}") from problem
        return plane
