"""A pool in shared memory, which a worker and the GPU actor both map: the second mode, on the CPU.

The worker creates it, lays its KV tensors in it (`array`), and hands over a description and one descriptor.
The actor attaches, and uses it only after both sides have seen each other's bytes:

    worker: challenge = pool_probe.challenge(pool, pages)        a random pattern in scratch pages
    actor:  answer = probe_answer(pool, challenge)               what it read there; then its own pattern
    worker: pool_probe.judge(pool, answer)                       True: both directions work
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import mmap
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.errors import GeometryError
from kvtier.gpu.engine import Place, StreamEvent
from kvtier.gpu.layout import BufferSpec, LayerGroup, Plane, PoolLayout
from kvtier.gpu.pool import Pool
from kvtier.gpu.quantise import DTYPES, Values
from kvtier.gpu.tensors import Bytes

VERSION = 1
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
ALIGNMENT = 4096
_MADV_POPULATE_WRITE = 23


class MappablePool(ABC):
    """A worker's pool on a GPU that the GPU service maps, seen from the worker. pool: itself; place: its GPU.

    Calls from any thread.
    """

    pool: Pool
    place: Place

    @abstractmethod
    def export(self) -> dict[str, Any]:
        """Its description, of plain values and bytes. Raises GeometryError, with the fix; TierUnavailable."""

    @abstractmethod
    def challenge(self) -> Challenge:
        """Begin a probe: a random pattern goes into scratch pages. Raises TierUnavailable."""

    @abstractmethod
    def judge(self, answer: Answer) -> bool:
        """End it: whether each side read what the other wrote. Raises TierUnavailable."""

    @abstractmethod
    def relay(self, event: StreamEvent) -> int:
        """Number of an event that the service's streams can wait for, after this one."""

    @abstractmethod
    def listen(self, handles: Sequence[bytes]) -> Callable[[int], StreamEvent]:
        """The service's events by their numbers, for streams here; open while what is returned lives.

        Raises TierUnavailable.  What is returned raises GeometryError for a number that there is not.
        """


class SharedMemory:
    """A sealed memfd, mapped and faulted in. Its tensors live as long as it does."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self._map = mmap.mmap(fd, nbytes)
        self.bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self._used = 0

    @classmethod
    def create(cls, nbytes: int) -> SharedMemory:
        """New memory of at least one byte, all of it backed by pages now. Raises OSError."""
        if nbytes < 1:
            raise GeometryError(f"a shared pool of {nbytes} bytes holds nothing")
        fd = os.memfd_create("kvtier-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            memory = cls(fd, nbytes)
            memory._map.madvise(_MADV_POPULATE_WRITE)
        except OSError:
            os.close(fd)
            raise
        return memory

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The next part of the memory as an array, page-aligned. Raises GeometryError when it is full."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + nbytes > self.nbytes:
            raise GeometryError(f"{nbytes} bytes do not fit into the rest of a shared pool of {self.nbytes}")
        self._used = start + nbytes
        return self.bytes[start : start + nbytes].view(dtype).reshape(shape)

    def offset_of(self, address: int, nbytes: int) -> int:
        """Where in the memory this address is. Raises GeometryError for memory that lies elsewhere."""
        offset = address - int(self.bytes.ctypes.data)
        if not 0 <= offset <= self.nbytes - nbytes:
            raise GeometryError(
                "a tensor of the pool is not in the shared memory", fix="make it with SharedMemory.array()"
            )
        return offset

    def close(self) -> None:
        """Close the descriptor; the mapping goes when the last array of it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SharedPool:
    """A Pool in shared memory, on either side."""

    def __init__(self, layout: PoolLayout, memory: SharedMemory, offsets: Sequence[int]) -> None:
        self.memory = memory
        self.offsets = tuple(offsets)
        parts = [
            memory.bytes[offset : offset + buffer.nbytes]
            for offset, buffer in zip(offsets, layout.buffers, strict=True)
        ]
        self.pool = Pool(layout, parts)

    @classmethod
    def create(cls, layout: PoolLayout, memory: SharedMemory) -> SharedPool:
        """On the worker's side: the layout was described from arrays of this memory. Raises GeometryError."""
        offsets = [memory.offset_of(buffer.address, buffer.nbytes) for buffer in layout.buffers]
        return cls(layout, memory, offsets)

    def export(self) -> tuple[dict[str, Any], list[int]]:
        """(description of plain values, descriptors to pass along); the descriptors stay this side's."""
        description = {
            "version": VERSION,
            "nbytes": self.memory.nbytes,
            "offsets": list(self.offsets),
            "layout": asdict(self.pool.layout),
        }
        return description, [self.memory.fd]

    @classmethod
    def attach(cls, description: Mapping[str, Any], fds: Sequence[int]) -> SharedPool:
        """On the actor's side; takes the descriptors over, also when it raises.

        Raises GeometryError for a description that does not fit the memory, or memory that could shrink
        under the actor; OSError.
        """
        with ExitStack() as on_failure:
            for fd in fds:
                on_failure.callback(os.close, fd)
            if len(fds) != 1 or description.get("version") != VERSION:
                raise GeometryError("not the description of a shared pool")
            nbytes = os.fstat(fds[0]).st_size
            if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & SEALS != SEALS or nbytes != description.get("nbytes"):
                raise GeometryError("the shared pool is not sealed, or of another size than described")
            try:
                layout = layout_from(description)
                pool = cls(layout, SharedMemory(fds[0], nbytes), description["offsets"])
            except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
                raise GeometryError(f"the description of a shared pool is malformed: {error!r}") from error
            on_failure.pop_all()
            return pool

    def close(self) -> None:
        """End this side's use. No copy may run."""
        self.memory.close()


def whole(value: object) -> int:
    """A size or offset that another process sent. Raises GeometryError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GeometryError(f"{value!r} is no size or offset")
    return value


def layout_from(description: Mapping[str, Any]) -> PoolLayout:
    """The layout that another process described, checked: `layout`, `offsets` and `nbytes` of its memory."""
    raw = description["layout"]
    planes = tuple(tuple(_plane_from(plane) for plane in group) for group in raw["planes"])
    groups = tuple(
        LayerGroup(g["kind"], tuple(g["layers"]), whole(g["window_tokens"])) for g in raw["groups"]
    )
    buffers = tuple(BufferSpec(whole(b["address"]), whole(b["nbytes"])) for b in raw["buffers"])
    offsets = [whole(offset) for offset in description["offsets"]]
    fits = len(offsets) == len(buffers) and all(
        offset + buffer.nbytes <= description["nbytes"]
        for offset, buffer in zip(offsets, buffers, strict=True)
    )
    if raw["style"] != "paged" or not fits or len(groups) != len(planes) or not all(planes):
        raise GeometryError("the shared pool's buffers do not fit its memory")
    sizes = whole(raw["block_tokens"]), whole(raw["itemsize"])
    return PoolLayout("paged", *sizes, groups, planes, buffers, _values_from(raw, sizes[1]))


def _values_from(raw: Mapping[str, Any], itemsize: int) -> Values | None:
    given = raw.get("values")
    if given is None:
        return None
    values = Values(given["dtype"], whole(given["vector"]))
    rows = [plane["row_bytes"] for group in raw["planes"] for plane in group]
    width = values.vector * values.itemsize
    if values.dtype not in DTYPES or values.itemsize != itemsize or any(not width or r % width for r in rows):
        raise GeometryError("the shared pool's values do not fit its rows")
    return values


def _plane_from(raw: Mapping[str, Any]) -> Plane:
    fields: dict[str, Any] = {name: str(raw[name]) if name == "form" else whole(raw[name]) for name in raw}
    plane = Plane(**fields)
    # A page whose parts overlap could claim more bytes than there is memory.
    if min(plane.pages, plane.page_tokens, plane.strips, plane.row_bytes) < 1 or (
        plane.page_bytes > plane.page_extent
    ):
        raise GeometryError("a plane of the shared pool is empty, or overlaps itself")
    return plane


# -- the copy-and-compare probe


@dataclass(frozen=True, slots=True)
class Challenge:
    """pages: scratch pages of group 0, whose content is lost. nonce: makes each probe's digests its own."""

    pages: tuple[int, ...]
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """seen: digest of what the actor read. written: digest of what it wrote there afterwards."""

    seen: bytes
    written: bytes


class PoolProbe:
    """The worker's side of the probe."""

    def __init__(self) -> None:
        self._challenge: Challenge | None = None
        self._digest = b""

    def challenge(self, pool: Pool, pages: Sequence[int]) -> Challenge:
        """Write a random pattern into the pages. Raises GeometryError for pages that are not there."""
        self._challenge = Challenge(tuple(pages), secrets.token_bytes(16))
        self._digest = _write_pattern(pool, self._challenge)
        return self._challenge

    def judge(self, pool: Pool, answer: Answer) -> bool:
        """Whether the actor read what was written here, and what it wrote is read here."""
        if self._challenge is None:
            return False
        seen = secrets.compare_digest(answer.seen, self._digest)
        written = secrets.compare_digest(answer.written, _digest(pool, self._challenge))
        return seen and written and answer.seen != answer.written


def probe_answer(pool: Pool, challenge: Challenge) -> Answer:
    """The actor's side: read the pages, then write another pattern into them. Raises GeometryError."""
    seen = _digest(pool, challenge)
    return Answer(seen, _write_pattern(pool, challenge))


def _write_pattern(pool: Pool, challenge: Challenge) -> bytes:
    table = _probe_pages(pool, challenge)
    for view in pool.views[0]:
        for page in table:
            rows = view.rows[page]
            rows[...] = np.frombuffer(secrets.token_bytes(rows.size), np.uint8).reshape(rows.shape)
    return _digest(pool, challenge)


def _digest(pool: Pool, challenge: Challenge) -> bytes:
    digest = hashlib.blake2b(challenge.nonce, digest_size=16)
    table = _probe_pages(pool, challenge)
    for view in pool.views[0]:
        for page in table:
            digest.update(view.rows[page].tobytes())
    return digest.digest()


def _probe_pages(pool: Pool, challenge: Challenge) -> list[int]:
    table = pool.bind(challenge.pages).tables[0]
    if table is None or not table.size:
        raise GeometryError("a probe needs at least one scratch page")
    return [int(page) for page in table]
