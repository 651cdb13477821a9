"""Lossless codecs of the disk tier, by the name that stands in headers and in the index.

raw         bytes as they are
lz4         LZ4; pays for payloads that repeat themselves, which KV does not
planes-lz4  byte planes, then LZ4 for the planes that become smaller
planes-zstd byte planes, then Zstandard: smaller, and dearer to decode

None of them is a part of a block's identity: what is read back are the bytes that were written.
"""

from __future__ import annotations

from kvtier.disk.codecs.codec import Codec, CodecMissing
from kvtier.disk.codecs.lz4_block import Lz4Block
from kvtier.disk.codecs.pieces import PieceCodec
from kvtier.disk.codecs.raw import Raw
from kvtier.disk.codecs.zstd_frame import ZstdFrame
from kvtier.errors import ConfigError

RAW = "raw"
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Raw(),
        PieceCodec("lz4", Lz4Block(), by_planes=False),
        PieceCodec("planes-lz4", Lz4Block(), by_planes=True),
        PieceCodec("planes-zstd", ZstdFrame(), by_planes=True),
    )
}

__all__ = ["CODECS", "RAW", "Codec", "CodecMissing", "check_codec"]


def check_codec(name: str, *, field: str = "disk.codec") -> None:
    """Raise ConfigError, naming `field`, when a codec is unknown or its package is missing."""
    codec = CODECS.get(name)
    if codec is None:
        raise ConfigError(field, f"there is no codec {name!r}", fix=f"use one of {', '.join(CODECS)}")
    try:
        codec.check_installed()
    except CodecMissing as problem:
        raise ConfigError(field, f"codec {name!r}: {problem.message}", fix=problem.fix) from problem
