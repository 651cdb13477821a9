"""One large conversation, and many at once: durable parks and cold restores against the drive."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kvtier.bench.drive import (
    READS,
    WRITES,
    Drive,
    Way,
    device_read_bytes,
    forget_files,
    forget_page_cache,
    written_bytes,
)
from kvtier.bench.lines import Line, rate_line, seconds
from kvtier.bench.memory import Bytes, pages_kind
from kvtier.bench.store import blocks_of, meta_of, opened, park, restore, sums_of
from kvtier.disk.tier import DiskTier

MiB = 1 << 20
BLOCK_BYTES = 32 * MiB
CONVERSATIONS = 8
_BEST_OF = 3
SHORT = [Way(True, 8 * MiB, 4), Way(True, 32 * MiB, 4)]


def best_ways(drive: Drive, folder: Path, rounds: int = 2) -> tuple[list[Way], list[Way], list[Line]]:
    """The quickest ways to write durably and to read cold, and what each way reached."""
    lines = []
    chosen = []
    for name, ways in (("write", WRITES), ("read", READS)):
        took = {way: _times(drive, folder, way, name, rounds) for way in ways}
        ranked = sorted(ways, key=lambda way: min(took[way]))
        chosen.append(ranked[:_BEST_OF])
        lines += [
            Line(f"drive {name}, {way}", round(drive.nbytes / min(took[way]) / 1e9, 2), "GB/s")
            for way in ranked
        ]
    return chosen[0], chosen[1], lines


def _times(drive: Drive, folder: Path, way: Way, name: str, rounds: int) -> list[float]:
    return [_write(drive, way) if name == "write" else _read(drive, folder, way) for _ in range(rounds)]


def _write(drive: Drive, way: Way) -> float:
    drive.renew()
    return seconds(lambda: drive.write(way))


def _read(drive: Drive, folder: Path, way: Way, forget: Callable[[Path], None] = forget_page_cache) -> float:
    forget(folder)
    return seconds(lambda: drive.read(way))


def large(folder: Path, nbytes: int, rounds: int) -> Iterator[Line]:
    """Parks and restores of `nbytes`, as one conversation and as eight at once."""
    drive = Drive(folder, nbytes)
    try:
        writes, reads, lines = best_ways(drive, folder)
        yield from lines
        blocks = blocks_of(drive.memory, BLOCK_BYTES)
        sums = sums_of(blocks)
        yield _parks(drive, folder, writes, rounds, blocks, sums)
        yield _parks_again(drive, folder, writes, rounds, blocks, sums)
        with opened(folder / "store", 4 * nbytes) as tier:
            park(tier, range(len(blocks)), blocks, sums)
            names = {"one conversation": 1, "eight conversations at once": CONVERSATIONS}
            for name, at_once in names.items():
                work = partial(restore_all, tier, range(len(blocks)), blocks, at_once)
                yield _restores(drive, folder, reads, rounds, name, work)
    finally:
        drive.close()


def _nothing() -> None:
    """A machine that serves is left alone: no flush of everybody's files."""


def short(folder: Path, nbytes: int, rounds: int) -> Iterator[Line]:
    """One conversation's durable park and restore, against two ways of plain writing and reading.

    All files go past the page cache; where they cannot, what was read may be in it: see the detail.
    """
    drive = Drive(folder, nbytes)
    ways = SHORT if drive.direct else [replace(way, direct=False) for way in SHORT]
    try:
        blocks = blocks_of(drive.memory, min(BLOCK_BYTES, nbytes))
        yield _parks_again(drive, folder, ways, rounds, blocks, sums_of(blocks), settle=_nothing)
        with opened(folder / "store", 2 * nbytes) as tier:
            park(tier, range(len(blocks)), blocks, sums_of(blocks))
            work = partial(restore, tier, range(len(blocks)), blocks)
            yield _restores(
                drive, folder, ways, rounds, "one conversation", work, forget=forget_files, settle=_nothing
            )
    finally:
        drive.close()


def restore_all(tier: DiskTier, numbers: range, blocks: Sequence[Bytes], at_once: int) -> None:
    """Blocks of these numbers, as so many conversations at the same time."""
    if at_once == 1:
        restore(tier, numbers, blocks)
        return
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(lambda n: restore(tier, numbers[n::at_once], blocks[n::at_once]), range(at_once)):
            pass


def _parks(
    drive: Drive,
    folder: Path,
    ways: Sequence[Way],
    rounds: int,
    blocks: Sequence[Bytes],
    sums: Sequence[int],
) -> Line:
    amplification = []

    def own() -> float:
        # A store of its own each round, so that its segments are as new as the drive's file.
        with opened(folder / "parked", 2 * drive.nbytes) as tier:
            before = written_bytes()
            took = seconds(lambda: park(tier, range(len(blocks)), blocks, sums))
            amplification.append((tier.stats().device_bytes, written_bytes() - before))
        delete(folder / "parked")
        return took

    limits, works = alternate_rounds([partial(_write, drive, way) for way in ways], own, rounds)
    segments, device = (
        statistics.median(column) / drive.nbytes for column in zip(*amplification, strict=True)
    )
    return _line(
        "durable park of one conversation",
        drive.nbytes,
        ways,
        limits,
        works,
        segment_over_user_bytes=round(segments, 4),
        device_over_user_bytes=round(device, 4),
    )


def _parks_again(
    drive: Drive,
    folder: Path,
    ways: Sequence[Way],
    rounds: int,
    blocks: Sequence[Bytes],
    sums: Sequence[int],
    settle: Callable[[], None] = os.sync,
) -> Line:
    """In room that was written before, as a store that is full has no other; the limit likewise."""
    with opened(folder / "again", 2 * drive.nbytes) as tier:

        def own() -> float:
            took = seconds(lambda: park(tier, range(len(blocks)), blocks, sums))
            for place in range(len(blocks)):
                tier.remove(meta_of(place, BLOCK_BYTES).object_id)
            tier.commit([])
            return took

        own()
        drive.write(ways[0])
        again = [partial(seconds, partial(drive.write, way)) for way in ways]
        limits, works = alternate_rounds(again, own, rounds, settle)
    delete(folder / "again")
    return _line("durable park of one conversation, in used room", drive.nbytes, ways, limits, works)


def _restores(
    drive: Drive,
    folder: Path,
    ways: Sequence[Way],
    rounds: int,
    name: str,
    work: Callable[[], None],
    forget: Callable[[Path], None] = forget_page_cache,
    settle: Callable[[], None] = os.sync,
) -> Line:
    cold = []

    def own() -> float:
        forget(folder)
        before = device_read_bytes()
        took = seconds(work)
        cold.append((device_read_bytes() - before) / drive.nbytes)
        return took

    plain = [partial(_read, drive, folder, way, forget) for way in ways]
    limits, works = alternate_rounds(plain, own, rounds, settle)
    read = round(statistics.median(cold), 3)
    return _line(f"cold restore of {name}", drive.nbytes, ways, limits, works, read_from_device=read)


def alternate_rounds(
    limits: Sequence[Callable[[], float]],
    own: Callable[[], float],
    rounds: int,
    settle: Callable[[], None] = os.sync,
) -> tuple[list[list[float]], list[float]]:
    """Seconds of each limit and of `own`, once a round, in another order each time.

    settle: before each, so that what the one before left behind, deleted files above all, is written.
    """
    calls = [*limits, own]
    took: list[list[float]] = [[] for _ in calls]
    draw = random.Random(rounds)
    for _ in range(rounds):
        for place in draw.sample(range(len(calls)), len(calls)):
            settle()
            took[place].append(calls[place]())
    return took[:-1], took[-1]


def _line(
    name: str,
    nbytes: int,
    ways: Sequence[Way],
    limits: Sequence[Sequence[float]],
    works: Sequence[float],
    **detail: Any,
) -> Line:
    """Against the way with the best median, round by round; and against the luckiest of each round."""
    best = min(range(len(ways)), key=lambda place: statistics.median(limits[place]))
    lucky = [min(each) / own for each, own in zip(zip(*limits, strict=True), works, strict=True)]
    return rate_line(
        name,
        nbytes,
        limits[best],
        works,
        bytes=nbytes,
        memory=pages_kind(),
        limit_way=str(ways[best]),
        ratio_to_luckiest_of_each_round=round(statistics.median(lucky), 3),
        **detail,
    )


def delete(folder: Path) -> None:
    """A folder and all that is in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
