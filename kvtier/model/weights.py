"""Tells the weights in a folder apart: a digest over every weights file, sampled or whole.

Sampled: each file's name, size and safetensors header, and of every tensor the first, middle and last 4 KiB
(tensors of up to 12 KiB whole).  That sees any training, merging or quantization that touches a tensor
throughout, and any tensor that is added, dropped, renamed or reshaped.  It cannot see a change that lies
between the samples of a large tensor: some edited rows of an embedding, say.  `full` reads every byte and
sees all; it takes two minutes for 100 GB, or as long as the disk does.  Files of other formats have 256
ranges of 16 KiB, spread evenly.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from kvtier.errors import FingerprintError
from kvtier.keys import hash_fields

SAMPLE_BYTES = 4096
SPREAD_RANGES = 256
SPREAD_RANGE_BYTES = 16 * 1024

Range: TypeAlias = tuple[int, int]  # first byte, length

_WEIGHTS_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
# Small files that change what the weights compute: code, shard maps, quantization settings.
_SIDE_SUFFIXES = (".py", ".index.json")
_SIDE_NAMES = frozenset(
    {"adapter_config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json"}
)
_LFS_START = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_READ_BYTES = 4 * 1024 * 1024


def weights_digest(folder: Path, *, full: bool) -> bytes:
    """32 bytes over all weights files of a folder (not its subfolders), in whatever order they are listed.

    Symbolic links count as the files they point to, under their own names.  Raises FingerprintError when
    there are no weights, or when a file is not what its name says, cut off, or unreadable.
    """
    try:
        entries = sorted((e for e in folder.iterdir() if not e.is_dir()), key=lambda e: e.name)
        weights = [e for e in entries if e.suffix in _WEIGHTS_SUFFIXES]
        side = [e for e in entries if e.name in _SIDE_NAMES or e.name.endswith(_SIDE_SUFFIXES)]
        if not weights:
            raise FingerprintError(
                f"no weights found in {folder}",
                fix="give the folder with the .safetensors files, or use Fingerprint.of_revision",
            )
        fields = [b"full" if full else b"sampled"]
        for path in weights:
            fields += [b"weights", os.fsencode(path.name), _file_digest(path, full=full)]
        for path in side:
            fields += [b"side", os.fsencode(path.name), hashlib.sha256(path.read_bytes()).digest()]
    except OSError as error:
        raise FingerprintError(f"cannot read the weights in {folder}: {error}") from error
    return hash_fields(b"kvtier.w", fields)


def _file_digest(path: Path, *, full: bool) -> bytes:
    """SHA-256 over the file's size and either all of its bytes or its header and sampled ranges."""
    with path.open("rb", buffering=0) as file:
        fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        if size == 0 or _read(fd, path, (0, min(size, len(_LFS_START)))) == _LFS_START:
            raise FingerprintError(
                f"{path} is empty or a Git LFS pointer, not weights",
                fix="download it, such as with git lfs pull",
            )
        ranges = _tensor_ranges(fd, path, size) if path.suffix == ".safetensors" else _spread_ranges(size)
        digest = hashlib.sha256(struct.pack("<Q", size))
        for at in _all_ranges(size) if full else ranges:
            digest.update(struct.pack("<QQ", *at))
            digest.update(_read(fd, path, at))
        return digest.digest()


def _read(fd: int, path: Path, at: Range) -> bytes:
    data = os.pread(fd, at[1], at[0])
    if len(data) != at[1]:
        raise FingerprintError(f"{path} became shorter while it was read", fix="complete the download")
    return data


def _all_ranges(size: int) -> Iterator[Range]:
    return ((at, min(_READ_BYTES, size - at)) for at in range(0, size, _READ_BYTES))


def _spread_ranges(size: int) -> list[Range]:
    """Evenly spread ranges, the first at the start and the last at the end; all of a small file."""
    if size <= SPREAD_RANGES * SPREAD_RANGE_BYTES:
        return [(0, size)]
    room = size - SPREAD_RANGE_BYTES
    return [(room * i // (SPREAD_RANGES - 1), SPREAD_RANGE_BYTES) for i in range(SPREAD_RANGES)]


def _tensor_ranges(fd: int, path: Path, size: int) -> list[Range]:
    """The header of a safetensors file, and its tensors' samples in the order of their offsets.

    Layout: header length (u64, little-endian), header (JSON), data; offsets count from the data's start.
    """
    length = int.from_bytes(_read(fd, path, (0, 8)), "little") if size >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise FingerprintError(f"{path} is not a safetensors file: its header does not fit")
    data_start = 8 + length
    spans = _tensor_spans(path, _read(fd, path, (8, length)))
    if any(not 0 <= begin <= end for begin, end in spans):
        raise FingerprintError(f"{path} is not a safetensors file: it has negative offsets")
    if data_start + max((end for _, end in spans), default=0) != size:
        raise FingerprintError(
            f"{path} has {size} bytes, its header tells of another length", fix="complete the download"
        )
    ranges: list[Range] = [(0, data_start)]
    for begin, end in sorted(spans):
        ranges += _samples(data_start + begin, end - begin)
    return ranges


def _tensor_spans(path: Path, header: bytes) -> list[Range]:
    """(begin, end) of every tensor, from a safetensors header."""
    try:
        tensors: dict[str, Any] = json.loads(header)
        spans = [entry["data_offsets"] for name, entry in tensors.items() if name != "__metadata__"]
        return [(int(begin), int(end)) for begin, end in spans]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FingerprintError(f"{path} is not a safetensors file: its header is malformed") from error


def _samples(begin: int, length: int) -> list[Range]:
    if length <= 3 * SAMPLE_BYTES:
        return [(begin, length)] if length else []
    middle, last = begin + (length - SAMPLE_BYTES) // 2, begin + length - SAMPLE_BYTES
    return [(begin, SAMPLE_BYTES), (middle, SAMPLE_BYTES), (last, SAMPLE_BYTES)]
