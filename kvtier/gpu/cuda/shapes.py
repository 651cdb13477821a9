"""Planes of a pool as the kernels want them, and the gapless pieces of an object as copy calls want them.

Not run on a GPU yet; the arithmetic is tested against the CPU engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.gpu.layout import Plane
from kvtier.gpu.pool import Binding, PlaneView

Ints: TypeAlias = npt.NDArray[np.int64]
Records: TypeAlias = npt.NDArray[Any]

PLANE = np.dtype(
    [
        ("base", "<u8"),
        ("page_stride", "<u8"),
        ("strip_stride", "<u8"),
        ("token_stride", "<u8"),
        ("out", "<u8"),
        ("strips", "<u4"),
        ("row_bytes", "<u4"),
        ("gapless", "<u4"),
        ("unused", "<u4"),
    ]
)
"""KvPlane in kernels/locate.cuh."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of an object in its pages: `count` of them, from row `first` of the first page on."""

    first: int
    count: int
    page_tokens: int

    @property
    def pages(self) -> int:
        """Pages that have a part of it."""
        return -(-(self.first + self.count) // self.page_tokens)


@dataclass(frozen=True)
class Shape:
    """What all objects of some rows of one group share.

    table: PLANE records, `out` set.  nbytes: of an object.  piece_bytes: of a typical gapless piece.
    """

    table: Records
    rows: Rows
    nbytes: int
    piece_bytes: int

    @cached_property
    def template(self) -> Template:
        """Pieces for copy calls; made when the first object goes that way."""
        return Template.of(self.table, self.rows)

    def range_of(self, first: int, last: int) -> tuple[int, int]:
        """Bytes of the object that planes first .. last-1 make."""
        outs = self.table["out"]
        return int(outs[first]), int(outs[last]) if last < len(outs) else self.nbytes


class ShapeCache:
    """Shapes of the pools that are in use. Not thread-safe: each lane has its own."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._shapes: OrderedDict[tuple[int, int, Rows], tuple[Sequence[PlaneView], Shape]] = OrderedDict()

    def shape(self, binding: Binding, group: int, start: int, tokens: int, first_valid: int) -> Shape:
        """The shape of rows [first_valid, tokens) of the block at `start`."""
        views = binding.views[group]
        if binding.tables[group] is None:
            rows = Rows(0, tokens - first_valid, tokens - first_valid)
            return _shape(views, rows, binding.row_of(group, start) + first_valid)
        size = binding.layout.page_tokens(group)
        rows = Rows(first_valid % size, tokens - first_valid, size)
        # The views are kept with the shape, so their number is not given to others meanwhile.
        key = (id(views), group, rows)
        kept = self._shapes.get(key)
        if kept is None:
            kept = self._shapes[key] = (views, _shape(views, rows, None))
            if len(self._shapes) > self._limit:
                self._shapes.popitem(last=False)
        return kept[1]


def _shape(views: Sequence[PlaneView], rows: Rows, sequence_row: int | None) -> Shape:
    """sequence_row: the first row, in a contiguous cache."""
    planes = [view.plane for view in views]
    table = np.zeros(len(planes), PLANE)
    table["base"] = [view.address for view in views]
    for name in ("page_stride", "strip_stride", "token_stride", "strips", "row_bytes"):
        table[name] = [getattr(plane, name) for plane in planes]
    table["gapless"] = [_gapless(plane, sequence_row is not None) for plane in planes]
    if sequence_row is not None:
        table["base"] += table["token_stride"] * np.uint64(sequence_row)
    sizes = np.array([plane.token_bytes for plane in planes], np.int64) * rows.count
    table["out"][1:] = np.cumsum(sizes)[:-1]
    first = planes[0]
    in_page = min(rows.page_tokens, rows.count)
    piece = (first.row_bytes, in_page * first.row_bytes, in_page * first.token_bytes)[table["gapless"][0]]
    return Shape(table, rows, int(sizes.sum()), int(piece))


def _gapless(plane: Plane, sequence: bool) -> int:
    # Strips of a sequence lie a whole sequence apart, and an object has a part of it.
    if plane.page_is_piece and (not sequence or plane.strips == 1):
        return 2
    return 1 if plane.strip_is_piece else 0


@dataclass(frozen=True, slots=True)
class Pieces:
    """Gapless pieces in stored order. address: in the pool. offset: in the object. All int64 [n]."""

    address: Ints
    offset: Ints
    nbytes: Ints


@dataclass(frozen=True, slots=True)
class Template:
    """The pieces of all objects of a shape: address = fixed + ids[page] * stride. All int64 [n]."""

    fixed: Ints
    page: Ints
    stride: Ints
    offset: Ints
    nbytes: Ints

    @classmethod
    def of(cls, table: Records, rows: Rows) -> Template:
        """Of these planes."""
        parts = [_plane_pieces(plane, rows) for plane in table]
        return cls(*(np.concatenate([part[k] for part in parts]) for k in range(5)))


def pieces_of(shape: Shape, ids: npt.NDArray[np.integer[Any]], lo: int, hi: int) -> Pieces:
    """The pieces of bytes [lo, hi) of an object in pages `ids`; those that meet on both sides are one."""
    whole = shape.template
    first = int(np.searchsorted(whole.offset, lo, "right")) - 1
    part = slice(first, int(np.searchsorted(whole.offset, hi, "left")))
    address = whole.fixed[part] + ids[whole.page[part]] * whole.stride[part]
    offset, nbytes = whole.offset[part].copy(), whole.nbytes[part].copy()
    skipped = lo - int(offset[0])
    address[0] += skipped
    offset[0] += skipped
    nbytes[0] -= skipped
    nbytes[-1] = hi - offset[-1] if offset[-1] + nbytes[-1] > hi else nbytes[-1]
    return _joined(address, offset, nbytes)


def _plane_pieces(plane: Records, rows: Rows) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    pages = np.arange(rows.pages, dtype=np.int64)
    begins = np.maximum(pages * rows.page_tokens, rows.first)
    counts = np.minimum((pages + 1) * rows.page_tokens, rows.first + rows.count) - begins
    strips, row = int(plane["strips"]), int(plane["row_bytes"])
    strip = np.arange(strips, dtype=np.int64)
    skipped = (begins - pages * rows.page_tokens) * int(plane["token_stride"])
    fixed = int(plane["base"]) + skipped[:, None] + strip * int(plane["strip_stride"])
    out = int(plane["out"]) + (begins - rows.first) * strips * row
    offset = out[:, None] + strip * (counts * row)[:, None]
    page = np.broadcast_to(pages[:, None], fixed.shape)
    sizes = np.broadcast_to((counts * row)[:, None], fixed.shape)
    if not int(plane["gapless"]):
        token = np.arange(rows.page_tokens, dtype=np.int64)
        present = np.broadcast_to((token < counts[:, None])[:, None, :], (*fixed.shape, token.size))
        fixed = (fixed[:, :, None] + token * int(plane["token_stride"]))[present]
        offset = (offset[:, :, None] + token * row)[present]
        page = np.broadcast_to(page[:, :, None], present.shape)[present]
        sizes = np.full(fixed.shape, row, np.int64)
    return (
        fixed.ravel(),
        page.ravel(),
        np.full(fixed.size, int(plane["page_stride"]), np.int64),
        offset.ravel(),
        sizes.ravel(),
    )


def _joined(address: Ints, offset: Ints, nbytes: Ints) -> Pieces:
    if address.size < 2:
        return Pieces(address, offset, nbytes)
    apart = (address[1:] != address[:-1] + nbytes[:-1]) | (offset[1:] != offset[:-1] + nbytes[:-1])
    begins = np.concatenate([[0], np.flatnonzero(apart) + 1])
    return Pieces(address[begins], offset[begins], np.add.reduceat(nbytes, begins))
