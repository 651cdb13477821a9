"""A batch cut into loads: which bytes move together, in which order and which way. Pure: nothing is copied.

Not run on a GPU yet.

Item by item where nobody asks for layers.  Layer by layer otherwise: first one layer of all items, then the
next, then two, then four at a time, so that the first layers are early and the later ones cost few calls.  A
plane that holds several layers in each page (storage with the page outermost) is not taken apart: its pieces
would be small, so its layers are all ready together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvtier.checksum import PIECE_BYTES
from kvtier.errors import GeometryError
from kvtier.geometry import EXACT
from kvtier.gpu.cuda.device import TILE_BYTES
from kvtier.gpu.cuda.shapes import PLANE, Records, Shape
from kvtier.gpu.cuda.ways import Way, WayTable
from kvtier.gpu.engine import CopyBatch
from kvtier.gpu.layout import PoolLayout
from kvtier.gpu.quantise import Values
from kvtier.gpu.tensors import Bytes

MAX_LAYERS_AT_ONCE = 4
ALIGNMENT = 256
LOSS = np.dtype([("error_squares", "<f8"), ("value_squares", "<f8"), ("not_finite", "<u8")])
_DTYPES, _CODECS = ("bf16", "fp16", "fp32"), ("int8", "fp8")

SEGMENT = np.dtype(
    [
        ("planes", "<u8"),
        ("ids", "<u8"),
        ("linear", "<u8"),
        ("lo", "<u8"),
        ("hi", "<u8"),
        ("plane_count", "<u4"),
        ("page_tokens", "<u4"),
        ("first_row", "<u4"),
        ("rows", "<u4"),
        ("first_tile", "<u4"),
        ("item", "<u4"),
    ]
)
"""KvSegment in kernels/locate.cuh."""


@dataclass(frozen=True, slots=True)
class Live:
    """An item that is going to be copied.

    index: in its batch.  host: address of its slot.  stored: bytes there, fewer than in the pool's pages
    under a lossy codec.  scale_bytes: those that a decoder has to keep on the device.
    """

    index: int
    group: int
    shape: Shape
    ids: npt.NDArray[np.intp]
    host: int
    stored: int
    scale_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [lo, hi) of live item `live`. linear: where they lie in staging."""

    live: int
    lo: int
    hi: int
    linear: int


@dataclass(frozen=True, slots=True)
class Load:
    """Parts that move together. first: number of the first part's segment. tiles: of the kernels' launch."""

    way: Way
    parts: tuple[Part, ...]
    first: int
    tiles: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """Loads, and the pool's layers that are complete after them. No layers: the batch goes item by item."""

    layers: tuple[int, ...]
    loads: tuple[Load, ...]


@dataclass(frozen=True, slots=True)
class _Cell:
    """Planes first .. last-1 of a group: all that there is of these layers."""

    group: int
    layers: tuple[int, ...]
    first: int
    last: int


def cells_of(layout: PoolLayout, group: int) -> list[_Cell]:
    """The group's planes by layer, in stored order."""
    planes, members = layout.planes[group], layout.groups[group].layers
    begins = [i for i, plane in enumerate(planes) if not i or plane.layer != planes[i - 1].layer]
    cells = []
    for n, first in enumerate(begins):
        last = begins[n + 1] if n + 1 < len(begins) else len(planes)
        upto = planes[last].layer if last < len(planes) else members[-1] + 1
        layers = tuple(layer for layer in members if planes[first].layer <= layer < upto)
        cells.append(_Cell(group, layers, first, last))
    return cells


def layer_steps(layout: PoolLayout, groups: Sequence[int]) -> list[list[_Cell]]:
    """Cells of these groups, by layer, 1, 1, 2, 4, 4 ... at a time."""
    cells = sorted((c for g in groups for c in cells_of(layout, g)), key=lambda cell: cell.layers[0])
    steps: list[list[_Cell]] = []
    at = 0
    while at < len(cells):
        count = min(max(1, at), MAX_LAYERS_AT_ONCE)
        steps.append(cells[at : at + count])
        at += count
    return steps


def cut(batch: CopyBatch, items: Sequence[Live], table: WayTable, load_bytes: int) -> list[Step]:
    """The batch's steps. load_bytes: a load's most, a multiple of TILE_BYTES."""
    loads = _Loads(batch, items, table, load_bytes)
    if batch.fidelity != EXACT:
        return [_coded(batch, items, loads)]
    if not batch.after_layers and batch.on_layer is None:
        for number, live in enumerate(items):
            loads.add(number, 0, live.shape.nbytes)
        return [Step((), loads.take())]
    groups = sorted({live.group for live in items})
    steps = []
    for cells in layer_steps(batch.binding.layout, groups):
        for number, live in enumerate(items):
            mine = [cell for cell in cells if cell.group == live.group]
            if mine:
                loads.add(number, *live.shape.range_of(mine[0].first, mine[-1].last))
        layers = tuple(sorted(layer for cell in cells for layer in cell.layers))
        steps.append(Step(layers, loads.take()))
    return steps


def _coded(batch: CopyBatch, items: Sequence[Live], loads: _Loads) -> Step:
    """All at once: a scale comes before what it belongs to, whatever the layer."""
    for number, live in enumerate(items):
        loads.add_coded(number, live.stored)
    groups = {live.group for live in items}
    layers = [layer for group in groups for layer in batch.binding.layout.groups[group].layers]
    asked = batch.after_layers or batch.on_layer is not None
    return Step(tuple(sorted(layers)) if asked else (), loads.take())


def form_of(values: Values, codec: str) -> int:
    """Values and codec as the kernels take them (kv_form in kernels/codec.cuh)."""
    return values.vector | _DTYPES.index(values.dtype) << 32 | _CODECS.index(codec) << 40


class _Loads:
    """Fills loads with parts, in the order given."""

    def __init__(self, batch: CopyBatch, items: Sequence[Live], table: WayTable, load_bytes: int) -> None:
        self._ways = [table.way(batch.direction, live.shape.piece_bytes) for live in items]
        self._limit = load_bytes
        self._made: list[Load] = []
        self._parts: list[Part] = []
        self._way: Way = "staged"
        self._room = 0
        self._tiles = 0
        self._segments = 0

    def add(self, live: int, lo: int, hi: int) -> None:
        """Bytes [lo, hi) of this item, in as many parts as it takes."""
        while lo < hi:
            if self._ways[live] != self._way or self._room + min(hi - lo, TILE_BYTES) > self._limit:
                self._close()
                self._way = self._ways[live]
            count = min(hi - lo, self._limit - self._room)
            self._parts.append(Part(live, lo, lo + count, self._room))
            self._tiles += -(-count // TILE_BYTES)
            self._room += -(-count // ALIGNMENT) * ALIGNMENT
            lo += count

    def add_coded(self, live: int, nbytes: int) -> None:
        """All of an encoded object: loads of their own, of whole pieces of its checksum."""
        most = self._limit - self._limit % PIECE_BYTES
        if not most:
            raise GeometryError(f"a staging slot for a lossy codec has {PIECE_BYTES} bytes or more")
        for lo in range(0, nbytes, most):
            self._close()
            self._way = "staged"
            hi = min(lo + most, nbytes)
            self._parts.append(Part(live, lo, hi, 0))
            self._tiles = -(-(hi - lo) // TILE_BYTES)

    def take(self) -> tuple[Load, ...]:
        """What was filled since the last time."""
        self._close()
        made, self._made = tuple(self._made), []
        return made

    def _close(self) -> None:
        if self._parts:
            nbytes = sum(part.hi - part.lo for part in self._parts)
            first = self._segments
            self._segments += len(self._parts)
            self._made.append(Load(self._way, tuple(self._parts), first, self._tiles, nbytes))
        self._parts, self._room, self._tiles = [], 0, 0


@dataclass(slots=True)
class Descriptors:
    """What the kernels read, as one run of bytes, and where in it each thing begins.

    results: u64 for each live item, 0 at first.  losses: LOSS records, likewise.  checks, moves: SEGMENT
    records.  Then tables and page ids; then, beyond what is described, room for each item's scales.
    """

    nbytes: int
    described: int
    results: int
    losses: int
    scales: list[int]
    checks: int
    moves: int
    check_tiles: int
    _checks: Records
    _moves: Records
    _tables: list[tuple[int, Records]] = field(default_factory=list)
    _ids: list[tuple[int, npt.NDArray[np.intp]]] = field(default_factory=list)

    def write(self, memory: Bytes, device_base: int) -> None:
        """Fill `memory`, whose copy on the device is going to be at `device_base`."""
        memory[self.results : self.checks] = 0
        for records, at in ((self._checks, self.checks), (self._moves, self.moves)):
            there = memory[at : at + records.nbytes].view(SEGMENT)
            there[:] = records
            there["planes"] += np.uint64(device_base)
            there["ids"] += np.uint64(device_base)
        for at, table in self._tables:
            memory[at : at + table.nbytes].view(PLANE)[:] = table
        for at, ids in self._ids:
            memory[at : at + 4 * ids.size].view(np.uint32)[:] = ids


def describe_batch(items: Sequence[Live], steps: Sequence[Step], direct: Sequence[int]) -> Descriptors:
    """Descriptors of a batch. direct: for each item the address of its slot as kernels see it."""
    loads = [load for step in steps for load in step.loads]
    segments = sum(len(load.parts) for load in loads)
    losses_at = 8 * len(items)
    checks_at = losses_at + LOSS.itemsize * len(items)
    moves_at = checks_at + SEGMENT.itemsize * len(items)
    at = moves_at + SEGMENT.itemsize * segments
    tables: dict[int, tuple[int, Records]] = {}
    checks = np.zeros(len(items), SEGMENT)
    ids = []
    for i, live in enumerate(items):
        table = live.shape.table
        if id(table) not in tables:
            tables[id(table)] = (at, table)
            at += table.nbytes
        checks["planes"][i] = tables[id(table)][0]
    for i, live in enumerate(items):
        ids.append((at, live.ids))
        checks["ids"][i] = at
        at += -(-4 * live.ids.size // 8) * 8
    checks["hi"] = [live.shape.nbytes for live in items]
    checks["plane_count"] = [live.shape.table.size for live in items]
    for name in ("first", "count", "page_tokens"):
        column = {"first": "first_row", "count": "rows"}.get(name, name)
        checks[column] = [getattr(live.shape.rows, name) for live in items]
    checks["item"] = np.arange(len(items))
    counts = -(-checks["hi"].astype(np.int64) // PIECE_BYTES)
    checks["first_tile"][1:] = np.cumsum(counts)[:-1]
    described, scales = at, []
    for live in items:
        at = -(-at // ALIGNMENT) * ALIGNMENT
        scales.append(at)
        at += live.scale_bytes
    return Descriptors(
        at, described, 0, losses_at, scales, checks_at, moves_at, int(counts.sum()), checks,
        _moves(checks, loads, direct), list(tables.values()), ids,
    )  # fmt: skip


def _moves(checks: Records, loads: Sequence[Load], direct: Sequence[int]) -> Records:
    owners = [part.live for load in loads for part in load.parts]
    moves: Records = checks[owners]
    rows = []
    for load in loads:
        tile = 0
        for part in load.parts:
            linear = direct[part.live] + part.lo if load.way == "direct" else part.linear
            rows.append((linear, part.lo, part.hi, tile))
            tile += -(-(part.hi - part.lo) // TILE_BYTES)
    if rows:
        columns = np.array(rows, np.uint64).T
        for name, column in zip(("linear", "lo", "hi", "first_tile"), columns, strict=True):
            moves[name] = column
    return moves
