"""Which bytes of an object lie where: the copy plan of one block, the same for every block of its shape.

Pure and cached.  A plan cuts an object into units that threads take one by one; a unit is a list of steps,
each one call; steps are in stored order and no longer than `chunk_bytes` where the layout allows, so that
what was just copied is hashed while it is still in the core's cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from kvtier.checksum import PIECE_BYTES
from kvtier.gpu.layout import Plane, PoolLayout


@dataclass(frozen=True, slots=True)
class Cut:
    """How long steps are at most where one could be split, steps over several planes, and units, in bytes."""

    chunk_bytes: int
    merge_bytes: int
    unit_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """Bytes [lo, hi) of the object are one of these, in plane `plane` of its group:

    pages   whole pages first .. first+count of the object's page list, in `planes` planes from `plane` on
    bytes   bytes first .. first+count of page `page`, which lies in one piece
    rows    rows first .. first+count of strips strip_lo .. strip_hi of page `page`

    ended: range of pieces that this step completes in its unit: what a gather may hash after it.
    begun: range of pieces that begin in this step: what a scatter hashes, whose slot is complete.
    """

    kind: Literal["pages", "bytes", "rows"]
    plane: int
    first: int
    count: int
    lo: int
    hi: int
    page: int = 0
    strip_lo: int = 0
    strip_hi: int = 0
    ended: tuple[int, int] = (0, 0)
    begun: tuple[int, int] = (0, 0)
    planes: int = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """Work of one thread at a time. shared: pieces that other units have a part of."""

    steps: tuple[Step, ...]
    lo: int
    hi: int
    shared: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """units in stored order; sharers: for each shared piece the number of units with a part of it."""

    units: tuple[Unit, ...]
    nbytes: int
    sharers: dict[int, int]


@lru_cache(maxsize=512)
def plan_block(
    layout: PoolLayout,
    group: int,
    tokens: int,
    first_valid: int,
    cut: Cut,
) -> Plan:
    """The plan for rows [first_valid, tokens) of a block.

    Row numbers count from the block's start; pages from the page with row first_valid.
    """
    steps: list[Step] = []
    at = 0
    for index, plane in enumerate(layout.planes[group]):
        for step in _plane_steps(plane, index, layout.style, tokens, first_valid, cut.chunk_bytes, at):
            at = step.hi
            if steps and at - steps[-1].lo <= cut.merge_bytes and _follows(steps[-1], step):
                steps[-1] = replace(steps[-1], hi=at, planes=steps[-1].planes + 1)
            else:
                steps.append(step)
    units: list[list[Step]] = []
    for step in steps:
        if not units or step.hi - units[-1][0].lo > cut.unit_bytes:
            units.append([])
        units[-1].append(step)
    ranges = [(unit[0].lo, unit[-1].hi) for unit in units]
    touching = Counter(
        piece for lo, hi in ranges for piece in range(lo // PIECE_BYTES, -(-hi // PIECE_BYTES))
    )
    sharers = {piece: count for piece, count in touching.items() if count > 1}
    made = tuple(
        Unit(
            tuple(_with_hashes(unit, lo, hi, at)),
            lo,
            hi,
            tuple(p for p in range(lo // PIECE_BYTES, -(-hi // PIECE_BYTES)) if p in sharers),
        )
        for unit, (lo, hi) in zip(units, ranges, strict=True)
    )
    return Plan(made, at, sharers)


def _follows(before: Step, step: Step) -> bool:
    """Whether the step does with the next plane what `before` does with its last one."""
    return (
        before.kind == step.kind == "pages"
        and (before.first, before.count) == (step.first, step.count)
        and before.plane + before.planes == step.plane
    )


def _with_hashes(steps: list[Step], lo: int, hi: int, nbytes: int) -> Iterator[Step]:
    done = _up(lo)
    for step in steps:
        upto = nbytes if step.hi == nbytes else step.hi - step.hi % PIECE_BYTES
        after = (done, max(done, upto))
        done = after[1]
        before = (_up(step.lo), min(_up(step.hi), nbytes))
        yield replace(step, ended=after, begun=(before[0], max(before)))


def _up(at: int) -> int:
    return -(-at // PIECE_BYTES) * PIECE_BYTES


def _plane_steps(
    plane: Plane, index: int, style: str, tokens: int, first_valid: int, chunk: int, at: int
) -> Iterator[Step]:
    if style == "contiguous":
        yield from _rows(plane, index, 0, first_valid, tokens, chunk, at)
        return
    size = plane.page_tokens
    skipped = first_valid // size
    page, last = skipped, -(-tokens // size)
    while page < last:
        begin, end = max(first_valid, page * size), min(tokens, (page + 1) * size)
        if end - begin < size:
            rows = (begin - page * size, end - page * size)
            made = list(_rows(plane, index, page - skipped, *rows, chunk, at))
        elif plane.page_bytes > chunk:
            made = list(_big_page(plane, index, page - skipped, chunk, at))
        else:
            count = max(1, min(chunk // plane.page_bytes, tokens // size - page))
            made = [Step("pages", index, page - skipped, count, at, at + count * plane.page_bytes)]
            page += count - 1
        yield from made
        at = made[-1].hi
        page += 1


def _big_page(plane: Plane, index: int, page: int, chunk: int, at: int) -> Iterator[Step]:
    if not plane.page_is_piece:
        yield from _rows(plane, index, page, 0, plane.page_tokens, chunk, at)
        return
    for first in range(0, plane.page_bytes, chunk):
        count = min(chunk, plane.page_bytes - first)
        yield Step("bytes", index, first, count, at + first, at + first + count, page)


def _rows(plane: Plane, index: int, page: int, begin: int, end: int, chunk: int, at: int) -> Iterator[Step]:
    strip = (end - begin) * plane.row_bytes
    per_step = max(1, chunk // strip)
    for lo in range(0, plane.strips, per_step):
        hi = min(plane.strips, lo + per_step)
        yield Step(
            "rows",
            index,
            begin,
            end - begin,
            at + lo * strip,
            at + hi * strip,
            page,
            strip_lo=lo,
            strip_hi=hi,
        )
