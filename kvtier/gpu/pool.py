"""A layout laid over real memory, and the binding of one conversation's tokens to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.errors import GeometryError
from kvtier.gpu.describe import sequence_plane
from kvtier.gpu.layout import Plane, PoolLayout
from kvtier.gpu.tensors import Bytes, DeviceBytes, TensorLike, device_bytes, flat_bytes, spec_of

PageIds: TypeAlias = npt.NDArray[np.intp]
# Below it the C library copies with plain loops, at half the rate.
MIN_GRANULE_BYTES = 4096


class PlaneView:
    """One plane's memory, as the copy calls want it.

    rows: [pages, strips, tokens, row_bytes] uint8, any strides.  granules: [n, granule_bytes] uint8 without
    gaps; page p is the granules p * step + template.  One numpy call moves many pages through them, whatever
    lies between the parts of a page.
    """

    __slots__ = ("address", "granules", "pages", "plane", "rows", "step", "template")

    def __init__(self, plane: Plane, memory: Bytes) -> None:
        self.plane = plane
        self.address = int(memory.ctypes.data) + plane.offset
        start = memory[plane.offset :]
        if plane.offset + (plane.pages - 1) * plane.page_stride + plane.page_extent > memory.size:
            raise GeometryError("a plane reaches past the end of the pool's memory")
        strided = np.lib.stride_tricks.as_strided
        self.rows = strided(
            start,
            (plane.pages, plane.strips, plane.page_tokens, plane.row_bytes),
            (plane.page_stride, plane.strip_stride, plane.token_stride, 1),
        )
        self.pages = strided(start, (plane.pages, plane.page_bytes), (plane.page_stride, 1))
        offsets, piece = _pieces(plane)
        size = math.gcd(plane.page_stride, piece, *offsets.tolist())
        used = (plane.pages - 1) * plane.page_stride + plane.page_extent
        self.granules = start[: used - used % size].reshape(-1, size)
        self.step = plane.page_stride // size
        inner = np.arange(0, piece, size, dtype=np.intp)
        self.template: PageIds = ((offsets[:, None] + inner) // size).ravel()

    @property
    def location(self) -> str:
        """Whose memory it is: 'cpu', or 'cuda:0'."""
        return "cpu"

    def granule_ids(self, pages: PageIds) -> PageIds:
        """Indexes into `granules` of these pages, in stored order."""
        if self.template.size == 1:
            return pages * self.step
        return (pages[:, None] * self.step + self.template).ravel()


def _pieces(plane: Plane) -> tuple[PageIds, int]:
    """Where the gapless pieces of a page begin, in stored order, and the bytes of one."""
    if plane.page_is_piece:
        return np.zeros(1, np.intp), plane.page_bytes
    strips = np.arange(plane.strips, dtype=np.intp) * plane.strip_stride
    if plane.strip_is_piece:
        return strips, plane.page_tokens * plane.row_bytes
    tokens = np.arange(plane.page_tokens, dtype=np.intp) * plane.token_stride
    return (strips[:, None] + tokens).ravel(), plane.row_bytes


class DevicePlane(PlaneView):
    """One plane's memory on a GPU: its address. The CPU cannot look into it."""

    __slots__ = ("_location",)

    def __init__(self, plane: Plane, memory: DeviceBytes) -> None:
        if plane.offset + (plane.pages - 1) * plane.page_stride + plane.page_extent > memory.nbytes:
            raise GeometryError("a plane reaches past the end of the pool's memory")
        self.plane = plane
        self.address = memory.address + plane.offset
        self._location = memory.location

    @property
    def location(self) -> str:
        """As in PlaneView."""
        return self._location

    def __getattr__(self, name: str) -> NoReturn:
        raise GeometryError(
            f"the CPU engine cannot reach memory on {self._location}", fix="use the CUDA engine for this pool"
        )


class Span:
    """All planes of a group as one array of granules, so that one call moves pages of many planes.

    The array covers the addresses from the first plane to the end of the last, whatever lies between: only
    indexes inside of planes are ever used.  Each call costs two hand-overs of the GIL, so moving 2 MiB and
    not 512 KiB at a time is a fifth faster on busy cores.  low and high: its addresses.
    """

    __slots__ = ("granules", "high", "low", "origins", "per_page", "step", "template")

    def __init__(self, views: Sequence[PlaneView], size: int) -> None:
        addresses = [int(view.rows.ctypes.data) for view in views]
        plane = views[0].plane
        self.low = min(addresses)
        self.high = max(addresses) + (plane.pages - 1) * plane.page_stride + plane.page_extent
        lowest = views[addresses.index(self.low)].granules
        shape = ((self.high - self.low) // size, size)
        self.granules = np.lib.stride_tricks.as_strided(lowest, shape, (size, 1))
        self.origins: PageIds = (np.array(addresses, np.intp) - self.low) // size
        self.step = plane.page_stride // size
        scale = views[0].granules.shape[1] // size
        inner = np.arange(scale, dtype=np.intp)
        self.template: PageIds = (views[0].template[:, None] * scale + inner).ravel()
        self.per_page = self.template.size

    @classmethod
    def of(cls, views: Sequence[PlaneView]) -> Span | None:
        """The span of these planes; None where they are not alike, or too far from a common alignment."""
        first = views[0]
        alike = all(
            view.step == first.step
            and view.granules.shape[1] == first.granules.shape[1]
            and np.array_equal(view.template, first.template)
            and view.plane.pages == first.plane.pages
            for view in views
        )
        size = math.gcd(*(int(view.rows.ctypes.data - first.rows.ctypes.data) for view in views))
        size = math.gcd(size, first.granules.shape[1])
        if len(views) < 2 or not alike or size < min(MIN_GRANULE_BYTES, first.granules.shape[1]):
            return None
        return cls(views, size)

    def granule_ids(self, pages: PageIds) -> PageIds:
        """[planes, pages * per_page] indexes into `granules`, each plane's in stored order."""
        ids = (pages[:, None] * self.step + self.template).ravel()
        return self.origins[:, None] + ids

    def apart_from(self, memory: Bytes) -> bool:
        """Whether the memory lies outside of the span: numpy would copy it first if it did not."""
        address = int(memory.ctypes.data)
        return address >= self.high or address + memory.nbytes <= self.low


@dataclass(frozen=True, slots=True)
class Binding:
    """Where the tokens of one conversation lie.

    views: each group's planes.  spans: the same in one piece, where that can be.  tables: each group's page
    ids, in order of position; None in a contiguous cache.  bases: the position that each group's first page,
    or first row, stands for.  ends: the first position past what is bound.
    """

    layout: PoolLayout
    views: tuple[tuple[PlaneView, ...], ...]
    spans: tuple[Span | None, ...]
    tables: tuple[PageIds | None, ...]
    bases: tuple[int, ...]
    ends: tuple[int, ...]

    def check(self, group: int, start: int, tokens: int, first_valid: int) -> None:
        """Raise GeometryError unless these rows are bound and an object may consist of them."""
        layout = self.layout
        if not 0 <= group < len(layout.groups):
            raise GeometryError(f"there is no layer group {group}")
        if not (0 < tokens <= layout.block_tokens and 0 <= first_valid < tokens and start >= 0):
            raise GeometryError(f"no block has start {start}, {tokens} tokens, first_valid {first_valid}")
        if self.tables[group] is not None and start % layout.page_tokens(group):
            raise GeometryError(f"position {start} is not the beginning of a page")
        first = start + first_valid
        if first < self.bases[group] or start + tokens > self.ends[group]:
            raise GeometryError(
                f"positions {first} to {start + tokens} of group {group} are not bound; "
                f"{self.bases[group]} to {self.ends[group]} are"
            )

    def page_ids(self, group: int, start: int, tokens: int, first_valid: int) -> PageIds:
        """The pages that hold rows [first_valid, tokens) of the block at `start`."""
        table = self.tables[group]
        if table is None:
            return np.zeros(1, np.intp)
        size = self.layout.page_tokens(group)
        first = (start - self.bases[group]) // size
        return table[first + first_valid // size : first + -(-tokens // size)]

    def row_of(self, group: int, start: int) -> int:
        """In a contiguous cache, the row of position `start`; negative when rows before a window are gone."""
        return start - self.bases[group]

    def named_pages(self) -> frozenset[tuple[int, int]]:
        """(space, page id) of everything bound: what a ledger has to keep apart."""
        spaces = self.layout.spaces
        return frozenset(
            (spaces[g], page)
            for g, table in enumerate(self.tables)
            if table is not None
            for page in table.tolist()
        )


class Pool:
    """A paged layout and its memory.

    memory: for each of the layout's buffers, in order, the tensor that it describes, or a flat array of
    bytes; tensors on one GPU, or none there.  Nothing is copied; the pool keeps the memory alive.  Raises
    GeometryError.
    """

    def __init__(self, layout: PoolLayout, memory: Sequence[TensorLike]) -> None:
        if layout.style != "paged":
            raise GeometryError("a contiguous cache has no pool", fix="use bind_sequence()")
        if len(memory) != len(layout.buffers):
            raise GeometryError(f"{len(layout.buffers)} buffers described, {len(memory)} given")
        self.layout = layout
        parts = [
            memory_of(tensor, buffer.nbytes) for tensor, buffer in zip(memory, layout.buffers, strict=True)
        ]
        self.memory = tuple(part for part in parts if isinstance(part, np.ndarray))
        self.device_memory = tuple(part for part in parts if isinstance(part, DeviceBytes))
        if len({part.location for part in self.device_memory}) + bool(self.memory) > 1:
            raise GeometryError("the pool's memory is on several devices")
        self.views = tuple(
            tuple(_view(plane, parts[plane.buffer]) for plane in planes) for planes in layout.planes
        )
        self.spans = tuple(None if self.device_memory else Span.of(views) for views in self.views)

    def bind(
        self,
        pages: Sequence[int] | Sequence[Sequence[int]] | PageIds,
        *,
        bases: Sequence[int] = (),
        tokens: int | None = None,
    ) -> Binding:
        """Bind a conversation to pages.

        pages: page ids in order of position, one list for all groups or one list a group.  bases: for each
        group the position of its first page's first row, 0 when not given.  tokens: the conversation's
        length, when the pages must suffice for it.  Raises GeometryError for ids out of range, a page named
        twice, too few pages.
        """
        count = len(self.layout.groups)
        own = len(pages) > 0 and not isinstance(pages[0], int | np.integer)
        tables = [_page_table(part) for part in pages] if own else [_page_table(pages)] * count
        starts = tuple(bases) or (0,) * count
        if len(tables) != count or len(starts) != count:
            raise GeometryError(f"{len(tables)} page lists and {len(starts)} bases for {count} layer groups")
        ends = []
        for g, (table, base) in enumerate(zip(tables, starts, strict=True)):
            size = self.layout.page_tokens(g)
            if table.size and (int(table.min()) < 0 or int(table.max()) >= self.layout.pages(g)):
                raise GeometryError(f"a page id is outside of the pool's {self.layout.pages(g)} pages")
            if base < 0 or base % size:
                raise GeometryError(f"base {base} is not the beginning of a page of {size} tokens")
            ends.append(base + table.size * size)
            if tokens is not None and ends[g] < tokens:
                raise GeometryError(f"{table.size} pages from {base} on are too few for {tokens} tokens")
        self._check_once(tables if own else tables[:1])
        return Binding(self.layout, self.views, self.spans, tuple(tables), starts, tuple(ends))

    def _check_once(self, tables: Sequence[PageIds]) -> None:
        spaces = self.layout.spaces[: len(tables)]
        for space in set(spaces):
            ids = np.concatenate([table for s, table in zip(spaces, tables, strict=True) if s == space])
            if np.unique(ids).size < ids.size:
                raise GeometryError("a page is named twice", fix="give each page of the conversation once")


def _page_table(pages: object) -> PageIds:
    table = np.asarray(pages)
    if table.size and not (table.ndim == 1 and np.issubdtype(table.dtype, np.integer)):
        raise GeometryError("pages are not a list of integers")
    return table.astype(np.intp)


def bind_sequence(
    layout: PoolLayout,
    layers: Sequence[Sequence[TensorLike]],
    dims: str = "batch head token dim",
    *,
    bases: Sequence[int] = (),
) -> Binding:
    """Bind a conversation whose KV lies in tensors of its own.

    layers: for each layer its tensors, as in `contiguous`.  bases: for each group the position of the first
    row: over 0 where a sliding layer kept only its last rows.  Raises GeometryError.
    """
    starts = tuple(bases) or (0,) * len(layout.groups)
    if layout.style != "contiguous" or len(starts) != len(layout.groups):
        raise GeometryError("the layout is not contiguous, or has another number of layer groups")
    views: list[tuple[PlaneView, ...]] = []
    ends = []
    for g, group in enumerate(layout.groups):
        tensors = [(layer, tensor) for layer in group.layers for tensor in _layer(layers, layer)]
        if len(tensors) != len(layout.planes[g]):
            raise GeometryError(f"group {g} has {len(layout.planes[g])} tensors, {len(tensors)} were given")
        found = []
        for (layer, tensor), wanted in zip(tensors, layout.planes[g], strict=True):
            spec = spec_of(tensor)
            plane = sequence_plane(spec, dims, layer=layer, group=g)
            if (plane.strips, plane.row_bytes, spec.itemsize) != (
                wanted.strips,
                wanted.row_bytes,
                layout.itemsize,
            ):
                raise GeometryError(f"a tensor of layer {layer}, {spec.dtype} {spec.shape}, does not fit")
            found.append(_view(plane, memory_of(tensor, spec.span_bytes)))
        lengths = {view.plane.page_tokens for view in found}
        if len(lengths) > 1:
            raise GeometryError(f"the tensors of group {g} differ in length: {sorted(lengths)}")
        views.append(tuple(found))
        ends.append(starts[g] + lengths.pop())
    return Binding(layout, tuple(views), (None,) * len(views), (None,) * len(views), starts, tuple(ends))


def memory_of(tensor: TensorLike, nbytes: int) -> Bytes | DeviceBytes:
    """The tensor's memory, where it is. Raises GeometryError."""
    return device_bytes(tensor, nbytes) or flat_bytes(tensor, nbytes)


def _view(plane: Plane, memory: Bytes | DeviceBytes) -> PlaneView:
    return DevicePlane(plane, memory) if isinstance(memory, DeviceBytes) else PlaneView(plane, memory)


def _layer(layers: Sequence[Sequence[TensorLike]], layer: int) -> Sequence[TensorLike]:
    if layer >= len(layers):
        raise GeometryError(f"layer {layer} was not given")
    return layers[layer]
