"""The numpy calls behind a plan's steps, in both directions. They release the GIL while they copy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvtier.checksum import PIECE_BYTES, piece_sum
from kvtier.gpu.plan import Cut, Plan, Step, Unit, plan_block
from kvtier.gpu.pool import Binding, PageIds, PlaneView
from kvtier.gpu.tensors import Bytes


class BlockCopy:
    """One object's copy: its plan, its planes and its slot. Units may run in any order and at once.

    slot: uint8 [nbytes].  Nothing here is locked: units touch disjoint bytes.
    """

    __slots__ = ("_ids", "_row", "_slot", "_span", "_span_ids", "_tables", "_views", "plan")

    def __init__(
        self,
        binding: Binding,
        group: int,
        rows: tuple[int, int, int],
        slot: Bytes,
        cut: Cut,
    ) -> None:
        """rows: (start, tokens, first_valid), checked."""
        start, tokens, first_valid = rows
        span = binding.spans[group]
        self._span = span if span is not None and span.apart_from(slot) else None
        here = cut if self._span is not None else replace(cut, merge_bytes=0)
        self.plan: Plan = plan_block(binding.layout, group, tokens, first_valid, here)
        self._views: tuple[PlaneView, ...] = binding.views[group]
        self._ids = binding.page_ids(group, start, tokens, first_valid)
        self._row = binding.row_of(group, start) if binding.tables[group] is None else 0
        self._slot = slot
        self._span_ids: PageIds | None = None
        self._tables: dict[tuple[int, int, int], PageIds] = {}

    def gather(self, unit: Unit, hashing: bool) -> int:
        """Copy pool -> slot; answers the sum of the pieces that lie in this unit alone, 0 unless hashing."""
        total = 0
        for step in unit.steps:
            self._gather_step(step)
            if hashing:
                total += self._hash(*step.ended)
        return total

    def scatter(self, unit: Unit, hashing: bool) -> int:
        """Copy slot -> pool; answers the sum of the pieces that begin in this unit, 0 unless hashing."""
        total = 0
        for step in unit.steps:
            self._scatter_step(step)
            if hashing:
                total += self._hash(*step.begun)
        return total

    def hash_piece(self, piece: int) -> int:
        """The hash of one piece of the slot."""
        return self._hash(piece * PIECE_BYTES, min((piece + 1) * PIECE_BYTES, self.plan.nbytes))

    def _hash(self, lo: int, hi: int) -> int:
        if lo >= hi:
            return 0
        return piece_sum(self._slot[lo:hi], lo // PIECE_BYTES, hi - lo)

    def _gather_step(self, step: Step) -> None:
        view, into = self._views[step.plane], self._slot[step.lo : step.hi]
        if step.kind == "pages":
            granules, ids = self._granules(view, step)
            # "clip" writes straight into `out`; "raise" would go through a buffer. The ids were checked.
            np.take(granules, ids, axis=0, out=into.reshape(-1, granules.shape[1]), mode="clip")
        elif step.kind == "bytes":
            into[:] = view.pages[self._ids[step.page], step.first : step.first + step.count]
        else:
            rows = self._rows(view, step)
            into.reshape(rows.shape)[...] = rows

    def _scatter_step(self, step: Step) -> None:
        view, data = self._views[step.plane], self._slot[step.lo : step.hi]
        if step.kind == "pages":
            granules, ids = self._granules(view, step)
            granules[ids] = data.reshape(-1, granules.shape[1])
        elif step.kind == "bytes":
            view.pages[self._ids[step.page], step.first : step.first + step.count] = data
        else:
            rows = self._rows(view, step)
            rows[...] = data.reshape(rows.shape)

    def _rows(self, view: PlaneView, step: Step) -> Bytes:
        begin = self._row + step.first
        page: Bytes = view.rows[self._ids[step.page]]
        return page[step.strip_lo : step.strip_hi, begin : begin + step.count]

    def _granules(self, view: PlaneView, step: Step) -> tuple[Bytes, PageIds]:
        """The array and the indexes that a 'pages' step moves through."""
        # Two threads that fill a cache at once write the same.
        span = self._span
        # For one plane its own granules serve better: they are as long as a page, those of a span are not.
        if span is not None and step.planes > 1:
            if self._span_ids is None:
                self._span_ids = span.granule_ids(self._ids)
            pages = slice(step.first * span.per_page, (step.first + step.count) * span.per_page)
            return span.granules, self._span_ids[step.plane : step.plane + step.planes, pages].ravel()
        # Planes of one group mostly index alike.
        key = (view.step, view.template.size, int(view.template[-1]))
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = view.granule_ids(self._ids)
        per_page = view.template.size
        return view.granules, table[step.first * per_page : (step.first + step.count) * per_page]
