"""Copies alone: the link's limits, the three ways, whole conversations, layers, checksums."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.gpu.rig import Bench, Conversation, conversations, pool_over, start, with_checksums
from kvtier.bench.lines import Line
from kvtier.bench.link import DIRECTIONS, Link
from kvtier.gpu.cuda import inspect
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.measure import WayRates
from kvtier.gpu.cuda.ways import WAYS, fit_table
from kvtier.gpu.engine import Direction, StreamEvent

NAMES = {"gather": "device to host", "scatter": "host to device"}


def gigabytes(nbytes: float, seconds: float) -> float:
    """GB/s, of 1e9 bytes."""
    return round(nbytes / seconds / 1e9, 2)


def limits(bench: Bench) -> list[Line]:
    """The best copy of the registered arena in each direction, and in both at once; what the doctor says."""
    largest = bench.sizes.copy_bytes[-1]
    lines = [_doctor()]
    with (
        bench.arena(2 * largest, 1) as arena,
        bench.engine(arena, 2 * largest),
        bench.memory(2 * largest) as there,
    ):
        link = Link(bench.device, int(arena.view((0, 0), 1).ctypes.data), there.address)
        for directions in (("gather",), ("scatter",), DIRECTIONS):
            rates = {}
            for nbytes in bench.sizes.copy_bytes:
                best = min(link.seconds(directions, nbytes, largest) for _ in range(bench.sizes.rounds))
                rates[str(nbytes)] = gigabytes(nbytes * len(directions), best)
            name = " and ".join(NAMES[d] for d in directions)
            lines.append(
                Line(f"pinned copy, {name}", max(rates.values()), "GB/s", detail={"by_bytes": rates})
            )
        link.close()
    return lines


def _doctor() -> Line:
    found = [finding for finding in inspect.judge(inspect.gather()) if finding.grade != "good"]
    said = {finding.about: finding.text for finding in found}
    return Line("what the doctor finds to mend", float(len(found)), "findings", detail=said)


def ways(bench: Bench) -> list[Line]:
    """Three ways by piece sizes and directions, and the table that follows."""
    rates = WayRates(bench.device, bench.sizes.way_bytes, 4 if not bench.dry else 2)
    found: dict[tuple[str, str, int], float] = {}
    lines = []
    try:
        for direction in DIRECTIONS:
            for piece in bench.sizes.pieces:
                for way in WAYS:
                    found[direction, way, piece] = rates.rate(direction, way, piece)
                row: dict[str, Any] = {way: round(found[direction, way, piece] / 1e9, 2) for way in WAYS}
                best = max(row.values())
                lines.append(Line(f"pieces of {piece} B, {NAMES[direction]}", best, "GB/s", detail=row))
        table = fit_table(lambda d, w, p: found[d, w, p], pieces=bench.sizes.pieces)
        rows: dict[str, Any] = {d: [[upto, way] for upto, way in getattr(table, d)] for d in DIRECTIONS}
        lines.append(
            Line("ways in the fitted table", len(table.gather) + len(table.scatter), "rows", detail=rows)
        )
    finally:
        rates.close()
    return lines


def _conversation(bench: Bench, across: bool) -> list[Line]:
    sizes = bench.sizes
    nbytes = sizes.conversation_bytes
    kind = "pages of all layers" if across else f"{sizes.page_tokens}-token pages by layer"
    blocks = 2 * (sizes.tokens // sizes.block_tokens)
    with (
        bench.arena(2 * nbytes, blocks) as arena,
        bench.memory(2 * nbytes) as memory,
        bench.engine(arena, 2 * nbytes) as engine,
    ):
        pool = pool_over(memory, sizes, across)
        one, two = conversations(pool, sizes)
        link = Link(bench.device, int(arena.view((0, 0), 1).ctypes.data), memory.address)
        lines = _compare(bench, engine, link, one, two, kind)
        link.close()
    return lines


def _compare(
    bench: Bench, engine: CudaCopyEngine, link: Link, one: Conversation, two: Conversation, kind: str
) -> list[Line]:
    """Alternately the link alone and the engine; ratios within a round. Bits are checked by checksums."""
    sizes, nbytes = bench.sizes, one.nbytes
    sums = start(engine, "gather", one, sizes, verify=True).wait_checksums()
    other = start(engine, "gather", two, sizes, verify=True).wait_checksums()
    one, two = with_checksums(one, sums), with_checksums(two, other)
    # The first conversation's bytes into the second's pages, and back out: they must be the same.
    crossed = Conversation(two.binding, one.items, nbytes)
    start(engine, "scatter", crossed, sizes, verify=True).wait()
    same = start(engine, "gather", crossed, sizes, verify=True).wait_checksums() == sums
    lines = [Line(f"bit-exact, {kind}", float(same), "bool")]
    works: dict[str, Callable[[], float]] = {
        "park": lambda: start(engine, "gather", one, sizes).wait(),
        "restore": lambda: start(engine, "scatter", one, sizes).wait(),
        "park and restore": lambda: _both(engine, one, two, bench),
    }
    tracks: dict[str, tuple[Direction, ...]] = {
        "park": ("gather",),
        "restore": ("scatter",),
        "park and restore": DIRECTIONS,
    }
    for name, work in works.items():
        directions = tracks[name]
        ratios, rates, bests = [], [], []
        for turn in range(sizes.rounds + 1):
            limit, own = link.seconds(directions, nbytes, nbytes), work()
            if turn:
                ratios.append(limit / own)
                rates.append(gigabytes(nbytes * len(directions), own))
                bests.append(gigabytes(nbytes * len(directions), limit))
        lines.append(
            Line(
                f"{name}, {sizes.tokens} tokens, {kind}",
                statistics.median(rates),
                "GB/s",
                statistics.median(bests),
                round(statistics.median(ratios), 3),
                {"ratios": [round(r, 3) for r in ratios], "limit_is": "one plain copy of as much"},
            )
        )
    return lines


def _both(engine: CudaCopyEngine, one: Conversation, two: Conversation, bench: Bench) -> float:
    begun = time.perf_counter()
    jobs = [start(engine, "gather", one, bench.sizes), start(engine, "scatter", two, bench.sizes)]
    for job in jobs:
        job.wait()
    return time.perf_counter() - begun


def conversation(bench: Bench) -> list[Line]:
    """Park and restore from scattered pages of each layer's own tensors."""
    return _conversation(bench, False)


def cross(bench: Bench) -> list[Line]:
    """The same from pages that hold all layers."""
    return _conversation(bench, True)


def layers(bench: Bench) -> list[Line]:
    """When layer 0 is in place, and when all is, of a restore layer by layer; and what the order costs."""
    sizes = bench.sizes
    nbytes = sizes.conversation_bytes
    with (
        bench.arena(nbytes, sizes.tokens // sizes.block_tokens) as arena,
        bench.memory(2 * nbytes) as memory,
        bench.engine(arena, nbytes) as engine,
    ):
        pool = pool_over(memory, sizes, False)
        what = conversations(pool, sizes, 1)[0]
        whole = bench_layers(bench, engine, what)
    return whole


def bench_layers(bench: Bench, engine: CudaCopyEngine, what: Conversation) -> list[Line]:
    """One batch for the whole conversation: layers come first over all of it only within a batch."""
    sizes = bench.sizes
    first, last, plain = [], [], []
    for turn in range(sizes.rounds + 1):
        events: dict[int, StreamEvent] = {}

        def note(layer: int, event: StreamEvent, events: dict[int, StreamEvent] = events) -> None:
            events.setdefault(layer, event)

        job = start(engine, "scatter", what, replace(sizes, batch_items=len(what.items)), on_layer=note)
        while 0 not in events:
            time.sleep(0)
        events[0].synchronize()
        seen = time.perf_counter() - job.begun_s
        whole = job.wait()
        alone = start(engine, "scatter", what, sizes).wait()
        if turn:
            first.append(seen)
            last.append(whole)
            plain.append(alone)
    return [
        Line(
            f"first layer in place, restore of {sizes.tokens} tokens",
            round(statistics.median(first) * 1e3, 3),
            "ms",
            round(statistics.median(last) * 1e3, 3),
            round(statistics.median(first) / statistics.median(last), 4),
            {"limit_is": "all layers", "item_by_item_ms": round(statistics.median(plain) * 1e3, 3)},
        )
    ]


def checksums(bench: Bench) -> list[Line]:
    """What checksums on the device cost a park and a restore."""
    sizes = bench.sizes
    nbytes = sizes.conversation_bytes
    lines = []
    with (
        bench.arena(nbytes, sizes.tokens // sizes.block_tokens) as arena,
        bench.memory(2 * nbytes) as memory,
        bench.engine(arena, nbytes) as engine,
    ):
        what = conversations(pool_over(memory, sizes, False), sizes, 1)[0]
        checked = with_checksums(what, start(engine, "gather", what, sizes, verify=True).wait_checksums())
        for direction in DIRECTIONS:
            ratios, rates = [], []
            for turn in range(sizes.rounds + 1):
                bare = start(engine, direction, checked, sizes).wait()
                full = start(engine, direction, checked, sizes, verify=True).wait()
                if turn:
                    ratios.append(full / bare - 1)
                    rates.append(gigabytes(nbytes, full))
            cost = round(statistics.median(ratios) * 100, 2)
            lines.append(
                Line(
                    f"checksums on the device, {NAMES[direction]}: time added",
                    cost,
                    "%",
                    5.0,
                    detail={"gb_s": statistics.median(rates), "rounds": [round(r, 3) for r in ratios]},
                )
            )
    return lines
