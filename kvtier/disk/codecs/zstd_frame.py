"""Zstandard frames, set to code by frequency and to spend next to no time on repetitions.

An exponent plane has few repetitions and a skewed distribution.  With the smallest hash table and the
longest minimal match, zstd's fast strategy comes within 3 % of the plane's entropy, and is both smaller and
at least twice as fast as levels 1 to 3, which pay for matches that save nothing.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

from kvtier.disk.codecs.codec import Bytes, CodecMissing
from kvtier.errors import CorruptObject

_WINDOW_LOG = 18
_MIN_MATCH = 7
_HASH_LOG = 6


@cache
def _library() -> Any:
    try:
        import zstandard
    except ImportError as problem:
        raise CodecMissing(
            "the package zstandard is not installed", fix="pip install 'kvtier[disk]'"
        ) from problem
    return zstandard


class ZstdFrame:
    """One plane of a piece at a time. A context belongs to one thread."""

    def __init__(self) -> None:
        self._contexts = threading.local()

    def check_installed(self) -> None:
        """See Compressor."""
        _library()

    def compress(self, plane: Bytes) -> bytes:
        """See Compressor."""
        context = getattr(self._contexts, "compressor", None)
        if context is None:
            context = self._contexts.compressor = _compressor()
        packed: bytes = context.compress(plane)
        return packed

    def decompress(self, packed: Bytes, nbytes: int) -> bytes:
        """See Compressor."""
        library = _library()
        context = getattr(self._contexts, "decompressor", None)
        if context is None:
            context = library.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
            self._contexts.decompressor = context
        try:
            # The library takes as much memory as the frame says, so that is looked at first.
            said = library.get_frame_parameters(packed).content_size
            if said != nbytes:
                raise CorruptObject(f"a zstd frame of {said} bytes where {nbytes} should be")
            plane: bytes = context.decompress(packed, allow_extra_data=False)
        except library.ZstdError as problem:
            raise CorruptObject(f"a zstd frame cannot be decoded: {problem}") from problem
        return plane


def _compressor() -> Any:
    library = _library()
    parameters = library.ZstdCompressionParameters(
        strategy=library.STRATEGY_FAST,
        window_log=_WINDOW_LOG,
        hash_log=_HASH_LOG,
        min_match=_MIN_MATCH,
        write_content_size=True,
    )
    return library.ZstdCompressor(compression_params=parameters)
