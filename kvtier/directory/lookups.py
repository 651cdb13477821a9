"""How far each node could restore a chain of blocks: asked of all shards, put together by the asker. Pure.

Restorable to n tokens: all `full` parts of [0, n), the `sliding` parts that cover the window before n, the
`state` part of the block that ends at n, in every wanted shard of the model, in either tier of one node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from kvtier.directory.announcements import HINT_BYTES, Layout
from kvtier.directory.forms import Form, part_bytes
from kvtier.directory.routing import hints, shards_of
from kvtier.keys import BlockRef

Ints: TypeAlias = npt.NDArray[np.int64]
Value = TypeVar("Value")
Mask: TypeAlias = npt.NDArray[np.bool_]


class Hits(msgspec.Struct, frozen=True, array_like=True):
    """A shard's answer: packed columns, one entry for each holder of each block that was asked for.

    of: uint32, which of the asked blocks.  node_at: uint16, index into `nodes`, (name, epoch).  form_at:
    uint32, index into `forms`.
    """

    nodes: tuple[tuple[str, int], ...]
    forms: tuple[Form, ...]
    of: bytes
    node_at: bytes
    form_at: bytes


class Question(NamedTuple):
    """What to ask one shard. keys: packed hints. places: which blocks of the chain they are."""

    shard: int
    keys: bytes
    places: Ints


@dataclass(frozen=True, slots=True)
class Front:
    """What one node could restore of a chain. blocks, tokens: length of the front.

    host_bytes: to load from its host memory.  disk_bytes: from its disk, before compression.  tier: 'host'
    when nothing is to be read from disk.
    """

    node: str
    epoch: int
    blocks: int
    tokens: int
    host_bytes: int
    disk_bytes: int

    @property
    def tier(self) -> str:
        """The slowest tier that takes part."""
        return "disk" if self.disk_bytes else "host"

    @property
    def nbytes(self) -> int:
        """All bytes to load."""
        return self.host_bytes + self.disk_bytes


def as_asked(hits: Hits, layout: Layout) -> Hits:
    """The same, said in the asker's layout: it knows what its model's layer groups are.

    What a node has beside that layout is left out; what it lacks of it is missing.
    """
    return msgspec.structs.replace(hits, forms=tuple(_in_layout(form, layout) for form in hits.forms))


def _in_layout(form: Form, layout: Layout) -> Form:
    bits = {(part.group, part.shard): bit for bit, part in enumerate(form.layout.parts)}
    host = disk = 0
    for bit, part in enumerate(layout.parts):
        at = bits.get((part.group, part.shard))
        if at is not None:
            host |= (form.host >> at & 1) << bit
            disk |= (form.disk >> at & 1) << bit
    return Form(layout, form.tokens, host, disk)


def questions(chain: Sequence[BlockRef], shards: int) -> list[Question]:
    """What to ask which shard about a chain of blocks."""
    packed = hints(ref.key for ref in chain)
    shard_of = shards_of(packed, shards)
    lines = np.frombuffer(packed, np.uint8).reshape(-1, HINT_BYTES)
    every = ((int(shard), np.flatnonzero(shard_of == shard)) for shard in np.unique(shard_of))
    return [Question(shard, lines[places].tobytes(), places) for shard, places in every]


def fronts(
    chain: Sequence[BlockRef], answers: Iterable[tuple[Question, Hits]], wanted: Iterable[str] = ()
) -> list[Front]:
    """The nodes that can restore anything of the chain, the longest front first, then the least from disk.

    chain: from the first block on.  wanted: shards of the model that have to be there; none: all that the
    layouts name.  A shard of the directory that did not answer makes fronts shorter, never wrong.
    """
    if not chain:
        return []
    grid = _Grid(len(chain), answers)
    if not grid.nodes:
        return []
    ends = np.array([ref.start + ref.tokens for ref in chain], np.int64)
    reach = _Reach(grid, frozenset(wanted), ends)
    found = [
        Front(node, epoch, int(blocks), int(ends[blocks - 1]), int(host), int(disk))
        for (node, epoch), blocks, host, disk in zip(
            grid.nodes, reach.blocks, reach.host_bytes, reach.disk_bytes, strict=True
        )
        if blocks
    ]
    return sorted(found, key=lambda f: (-f.tokens, f.disk_bytes, f.node))


class _Grid:
    """nodes and forms over all answers. form_at: [nodes, blocks], 0 where a node has nothing (`_NOTHING`)."""

    def __init__(self, blocks: int, answers: Iterable[tuple[Question, Hits]]) -> None:
        numbers: dict[tuple[str, int], int] = {}
        form_numbers: dict[Form, int] = {}
        cells: list[tuple[Ints, Ints, Ints]] = []
        for question, hits in answers:
            rows = _renumber(hits.nodes, numbers)
            shapes = _renumber(hits.forms, form_numbers)
            of = question.places[np.frombuffer(hits.of, "<u4")]
            node_at, form_at = np.frombuffer(hits.node_at, "<u2"), np.frombuffer(hits.form_at, "<u4")
            cells.append((rows[node_at], of, shapes[form_at] + 1))
        self.nodes = list(numbers)
        self.forms = list(form_numbers)
        self.form_at = np.zeros((len(numbers), blocks), np.int64)
        for row, of, form in cells:
            self.form_at[row, of] = form


class _Reach:
    """How far each node of a grid reaches: blocks, host_bytes, disk_bytes, by node."""

    def __init__(self, grid: _Grid, wanted: frozenset[str], ends: Ints) -> None:
        kinds = [_Kind.of(form, wanted) for form in grid.forms]
        at, places = grid.form_at, np.arange(len(ends))
        full = _flags(k.full for k in kinds)[at]
        ends_here = np.logical_and.accumulate(full, axis=1)
        ends_here &= _flags(k.state for k in kinds)[at]
        starts: dict[int, Ints] = {}
        for window in sorted({w for k in kinds for w in k.windows}):
            # First block of the window before each end: the first one that ends behind its first token.
            starts[window] = np.searchsorted(ends, np.maximum(ends - window + 1, 0), side="right")
            has = _flags(window not in k.lacks for k in kinds)[at]
            last_gap = np.maximum.accumulate(np.where(has, -1, places), axis=1)
            ends_here &= last_gap < np.minimum(starts[window], places)
        self.blocks: Ints = np.where(ends_here, places + 1, 0).max(axis=1)
        self.host_bytes = self._bytes(at, [k.host_bytes for k in kinds], starts)
        self.disk_bytes = self._bytes(at, [k.disk_bytes for k in kinds], starts)

    def _bytes(self, at: Ints, by_kind: list[dict[int, int]], starts: dict[int, Ints]) -> Ints:
        """Bytes of one tier. by_kind: for each form its bytes by window; 0: full parts; -1: states."""
        nodes = np.arange(len(at))
        last = np.maximum(self.blocks - 1, 0)
        total = np.zeros(len(at), np.int64)
        for window in {w for kind in by_kind for w in kind}:
            each = np.array([0, *(kind.get(window, 0) for kind in by_kind)], np.int64)[at]
            if window == _STATE:
                total += each[nodes, last]
                continue
            up_to = np.concatenate((np.zeros((len(at), 1), np.int64), np.cumsum(each, axis=1)), axis=1)
            first = starts[window][last] if window else np.zeros_like(last)
            total += up_to[nodes, last + 1] - up_to[nodes, np.minimum(first, last)]
        return np.where(self.blocks > 0, total, 0)


_FULL, _STATE = 0, -1


class _Kind(NamedTuple):
    """What a form means to one question. lacks: those of its `windows` of which a sliding part is missing.

    *_bytes: to load from a tier, by window; host memory goes first.
    """

    full: bool
    state: bool
    windows: frozenset[int]
    lacks: frozenset[int]
    host_bytes: dict[int, int]
    disk_bytes: dict[int, int]

    @classmethod
    def of(cls, form: Form, wanted: frozenset[str]) -> _Kind:
        parts = [(bit, p) for bit, p in enumerate(form.layout.parts) if not wanted or p.shard in wanted]
        there = form.host | form.disk
        # A layout that does not know a wanted shard cannot say that it is whole.
        known = wanted <= {part.shard for _, part in parts} and bool(parts)
        missing = [part for bit, part in parts if not there >> bit & 1]
        windows = frozenset(part.window_tokens for _, part in parts if part.kind == "sliding")
        host: dict[int, int] = {}
        disk: dict[int, int] = {}
        for bit, part in parts:
            key = {"full": _FULL, "state": _STATE}.get(part.kind, part.window_tokens)
            tier = host if form.host >> bit & 1 else disk if form.disk >> bit & 1 else None
            if tier is not None:
                tier[key] = tier.get(key, 0) + part_bytes(form.layout, form.tokens, 1 << bit)
        return cls(
            known and all(part.kind != "full" for part in missing),
            all(part.kind != "state" for part in missing),
            windows,
            frozenset(part.window_tokens for part in missing if part.kind == "sliding"),
            host,
            disk,
        )


def _flags(values: Iterable[bool]) -> Mask:
    """Flags by form number + 1; not set for a node that has nothing of a block."""
    return np.array([False, *values], np.bool_)


def _renumber(values: Sequence[Value], numbers: dict[Value, int]) -> Ints:
    """The numbers of values in a table that all answers share."""
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)
