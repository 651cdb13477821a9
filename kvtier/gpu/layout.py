"""How KV lies in engine memory, and in which order its bytes are stored. Pure: shapes and strides only.

A plane is what one page table indexes in one go: `pages` pages at a fixed distance, each page
[strips][page_tokens][row_bytes].  What lies outside the page in memory (separate tensors for layers, K and
V) makes separate planes; what lies in the page outside its tokens (layers, K and V, heads) makes strips; what
lies inside a token makes the row.  A contiguous cache, one tensor [heads, seq, dim] a layer, has planes
whose strides are known only when a conversation's tensors are bound.

Stored order of an object, a block of n tokens of one group: its planes in order; in each plane its pages;
in each page [strips][rows][row_bytes] with the rows that the object has: all of them in a full page, the
first ones in the last page of a tail, the last ones in the page where a sliding window begins.  So an object
never carries rows of another owner, and its bytes do not depend on which pages it came from.
In a contiguous cache the block is the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from kvtier.errors import GeometryError
from kvtier.geometry import EXACT, LOSSY, Geometry, GroupGeometry
from kvtier.gpu.quantise import Values

ID_PREFIX = "kv1"


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep the same tokens. layers: indexes into the pool's layers, ascending."""

    kind: Literal["full", "sliding"]
    layers: tuple[int, ...]
    window_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """A range of memory that planes point into. address 0: not known."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plane:
    """See the module's text. Offsets and strides are in bytes; form: its part of the layout's id."""

    buffer: int
    offset: int
    pages: int
    page_stride: int
    page_tokens: int
    strips: int
    strip_stride: int
    token_stride: int
    row_bytes: int
    layer: int
    group: int
    form: str

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's KV, gaps not counted."""
        return self.strips * self.page_tokens * self.row_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this plane."""
        return self.strips * self.row_bytes

    @property
    def strip_is_piece(self) -> bool:
        """Whether the rows of a strip lie without gaps."""
        return self.page_tokens == 1 or self.token_stride == self.row_bytes

    @property
    def page_is_piece(self) -> bool:
        """Whether a page lies without gaps, in stored order."""
        return self.strip_is_piece and (
            self.strips == 1 or self.strip_stride == self.page_tokens * self.row_bytes
        )

    @property
    def page_extent(self) -> int:
        """Bytes from the first to the last of a page, gaps counted."""
        tokens = (self.page_tokens - 1) * self.token_stride
        return (self.strips - 1) * self.strip_stride + tokens + self.row_bytes


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """planes: for each group, in stored order. buffers: in the order of the tensors that were described.

    values: what rows are made of; None where a lossy codec could not find a head's values side by side.
    """

    style: Literal["paged", "contiguous"]
    block_tokens: int
    itemsize: int
    groups: tuple[LayerGroup, ...]
    planes: tuple[tuple[Plane, ...], ...]
    buffers: tuple[BufferSpec, ...]
    values: Values | None = None

    def page_tokens(self, group: int) -> int:
        """Tokens in a page of this group; in a contiguous cache the block."""
        return self.planes[group][0].page_tokens

    def pages(self, group: int) -> int:
        """Pages of this group's planes; page ids are below it. 0 in a contiguous cache."""
        return self.planes[group][0].pages

    def token_bytes(self, group: int) -> int:
        """Bytes of one token over all planes of the group."""
        return sum(plane.token_bytes for plane in self.planes[group])

    def stored_bytes(self, group: int, rows: int, fidelity: str = EXACT) -> int:
        """Bytes of an object with so many rows. Raises GeometryError for a fidelity that cannot be had."""
        if fidelity == EXACT:
            return rows * self.token_bytes(group)
        if fidelity not in LOSSY or self.values is None:
            raise GeometryError(f"this pool's KV cannot be kept at fidelity '{fidelity}'", fix="use 'exact'")
        return self.values.encoded_bytes(rows * self.token_bytes(group))

    @property
    def geometry(self) -> Geometry:
        """What the daemon has to know of this pool. page_tokens is 1 where any position will do."""
        sizes = [1 if self.style == "contiguous" else self.page_tokens(g) for g in range(len(self.groups))]
        groups = tuple(
            GroupGeometry(
                spec.kind,
                self.token_bytes(g),
                spec.window_tokens,
                lossy_token_bytes=self.stored_bytes(g, 1, LOSSY[0]) if self.values else 0,
            )
            for g, spec in enumerate(self.groups)
        )
        return Geometry(self.block_tokens, math.lcm(*sizes), groups, self.itemsize)

    @property
    def layout_id(self) -> str:
        """Names the stored byte order: equal exactly where stored bytes can be exchanged.

        Numbers of layers are not in it: the shard names them, and the ranks of a pipeline, whose numbers
        differ, must agree on one fingerprint.
        """
        parts = []
        for planes in self.planes:
            layers = [".".join(p.form for p in same) for _, same in groupby(planes, key=lambda p: p.layer)]
            parts.append("+".join(form for form, _ in groupby(layers)))
        return ";".join([ID_PREFIX, f"e{self.itemsize}", *parts])

    @property
    def spaces(self) -> tuple[int, ...]:
        """For each group, the page id space that it draws from: groups in one share memory."""
        found: list[int] = []
        for g in range(len(self.groups)):
            mates = [h for h in range(g) if self._share_memory(g, h)]
            found.append(found[mates[0]] if mates else g)
        return tuple(found)

    def _share_memory(self, g: int, h: int) -> bool:
        return any(
            self._buffer_name(a) == self._buffer_name(b) and _meet(a, b)
            for a in self.planes[g]
            for b in self.planes[h]
        )

    def _buffer_name(self, plane: Plane) -> tuple[str, int]:
        address = self.buffers[plane.buffer].address if self.buffers else 0
        return ("at", address) if address else ("nr", plane.buffer)


def _meet(a: Plane, b: Plane) -> bool:
    if a.page_stride != b.page_stride:
        return True
    return a.offset < b.offset + b.page_extent and b.offset < a.offset + a.page_extent


def assemble(
    style: Literal["paged", "contiguous"],
    block_tokens: int,
    groups: Sequence[LayerGroup],
    planes: Sequence[Sequence[Plane]],
    buffers: Sequence[BufferSpec],
    itemsize: int,
    values: Values | None = None,
) -> PoolLayout:
    """Check that the parts fit together. Raises GeometryError."""
    for group, members in zip(groups, planes, strict=True):
        if not members:
            raise GeometryError(f"the group of layers {group.layers} has no memory")
        sizes = {(p.pages, p.page_tokens) for p in members}
        if len(sizes) > 1:
            raise GeometryError(f"layers of one group differ in pages and page tokens: {sorted(sizes)}")
        if block_tokens < 1 or block_tokens % members[0].page_tokens:
            raise GeometryError(
                f"a block of {block_tokens} tokens is not whole pages of {members[0].page_tokens}",
                fix="make block_tokens a multiple of the engine's page size",
            )
        if group.kind == "sliding" and group.window_tokens < 1:
            raise GeometryError(f"the sliding group of layers {group.layers} has no window")
    return PoolLayout(
        style, block_tokens, itemsize, tuple(groups), tuple(tuple(p) for p in planes), tuple(buffers), values
    )


def check_groups(groups: Sequence[LayerGroup], layers: int) -> tuple[LayerGroup, ...]:
    """The groups, or one full group when none are given; every layer in exactly one. Raises GeometryError."""
    chosen = tuple(groups) or (LayerGroup("full", tuple(range(layers))),)
    if sorted(layer for group in chosen for layer in group.layers) != list(range(layers)):
        raise GeometryError(f"the layer groups do not name each of the {layers} layers once")
    if any(list(group.layers) != sorted(group.layers) for group in chosen):
        raise GeometryError("the layers of a group are not in ascending order")
    return chosen
