"""Lines of a trace from a file, a pipe or standard input, compressed or not, as a stream."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from kvtier.errors import TraceError

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK_BYTES = 1 << 16
# A line is a request; the longest that make sense name some hundred thousand blocks.
_LONGEST_LINE_BYTES = 64 << 20


def lines(source: BinaryIO) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of zstd-compressed or plain UTF-8 text; blank lines are left out.

    Raises TraceError for text that is not UTF-8, a compressed stream that is damaged or cut, and lines of
    over 64 MiB. Nothing is read ahead but a chunk.
    """
    number = 0
    rest = b""
    for chunk in _plain_chunks(source):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield number, _decoded(line, number)
        if len(rest) > _LONGEST_LINE_BYTES:
            raise TraceError(number + 1, f"is longer than {_LONGEST_LINE_BYTES} bytes")
    if rest.strip():
        yield number + 1, _decoded(rest, number + 1)


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise TraceError(number, f"is not UTF-8: {error.reason}") from error


def _plain_chunks(source: BinaryIO) -> Iterator[bytes]:
    start = _at_least(source, len(_ZSTD_MAGIC))
    if start[: len(_ZSTD_MAGIC)] != _ZSTD_MAGIC:
        yield start
        while chunk := _some(source):
            yield chunk
        return
    yield from _decompressed(source, start)


def _decompressed(source: BinaryIO, start: bytes) -> Iterator[bytes]:
    """Text of one zstd frame after the other; the end of the input has to be the end of a frame."""
    waiting = start
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        while waiting:
            yield frame.decompress(waiting)
            if frame.eof:
                waiting = frame.unused_data or _some(source)
                if waiting:
                    frame = zstandard.ZstdDecompressor().decompressobj()
            else:
                waiting = _some(source)
    except zstandard.ZstdError as error:
        raise TraceError(0, f"the compressed data is damaged: {error}") from error
    if not frame.eof:
        raise TraceError(0, "the compressed data ends in the middle")


def _at_least(source: BinaryIO, count: int) -> bytes:
    start = b""
    while len(start) < count and (chunk := _some(source)):
        start += chunk
    return start


def _some(source: BinaryIO) -> bytes:
    """What a pipe has now, without waiting for a full chunk."""
    if isinstance(source, io.BufferedReader):
        return source.read1(_CHUNK_BYTES)
    return source.read(_CHUNK_BYTES)
