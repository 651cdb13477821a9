"""One large conversation, and many at once: durable parks and cold restores against the drive."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.disk.drive import READS, WRITES, Drive, Way, device_read_bytes, forget_page_cache
from benchmarks.disk.store import blocks_of, opened, park, restore, sums_of
from benchmarks.lines import Line, rate_line, seconds
from kvtier.disk.tier import DiskTier

MiB = 1 << 20
BLOCK_BYTES = 32 * MiB
_BEST_OF = 3


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


def _read(drive: Drive, folder: Path, way: Way) -> float:
    forget_page_cache(folder)
    return seconds(lambda: drive.read(way))


def large(folder: Path, nbytes: int, rounds: int) -> Iterator[Line]:
    """Parks and restores of `nbytes`, as one conversation and as eight at once."""
    drive = Drive(folder, nbytes)
    try:
        writes, reads, lines = best_ways(drive, folder)
        yield from lines
        blocks = blocks_of(drive.memory, BLOCK_BYTES)
        sums = sums_of(blocks)
        yield _parks(drive, folder, writes, rounds, lambda tier, first: _park_one(tier, first, blocks, sums))
        with opened(folder / "store", 4 * nbytes) as tier:
            park(tier, range(len(blocks)), blocks, sums)
            names = {"one conversation": _restore_one, "eight conversations at once": _restore_eight}
            for name, work in names.items():
                yield _restores(drive, folder, reads, rounds, name, lambda w=work: w(tier, blocks))
    finally:
        drive.close()


def _park_one(tier: DiskTier, first: int, blocks: Sequence, sums: Sequence[int]) -> None:  # type: ignore[type-arg]
    park(tier, range(first, first + len(blocks)), blocks, sums)


def _restore_one(tier: DiskTier, blocks: Sequence) -> None:  # type: ignore[type-arg]
    restore(tier, range(len(blocks)), blocks)


def _restore_eight(tier: DiskTier, blocks: Sequence) -> None:  # type: ignore[type-arg]
    parts = [range(i, len(blocks), 8) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda part: restore(tier, part, [blocks[i] for i in part]), parts):
            pass


def _parks(
    drive: Drive, folder: Path, ways: Sequence[Way], rounds: int, work: Callable[[DiskTier, int], None]
) -> Line:
    limits, works = [], []
    for number in range(rounds):
        limits.append(min(_write(drive, way) for way in ways))
        # A store of its own each round, so that its segments are as new as the drive's file.
        with opened(folder / f"store-{number}", 2 * drive.nbytes) as tier:
            works.append(seconds(lambda tier=tier: work(tier, 0)))  # type: ignore[misc]
            written, user = tier.stats().device_bytes, tier.stats().user_bytes
        _delete(folder / f"store-{number}")
    return rate_line(
        "durable park of one conversation",
        drive.nbytes,
        limits,
        works,
        bytes=drive.nbytes,
        device_over_user_bytes=round(written / user, 4),
        limit_ways=[str(way) for way in ways],
    )


def _restores(
    drive: Drive, folder: Path, ways: Sequence[Way], rounds: int, name: str, work: Callable[[], None]
) -> Line:
    limits, works, cold = [], [], []
    for _ in range(rounds):
        limits.append(min(_read(drive, folder, way) for way in ways))
        forget_page_cache(folder)
        before = device_read_bytes()
        works.append(seconds(work))
        cold.append((device_read_bytes() - before) / drive.nbytes)
    return rate_line(
        f"cold restore of {name}",
        drive.nbytes,
        limits,
        works,
        bytes=drive.nbytes,
        read_from_device=round(statistics.median(cold), 3),
        limit_ways=[str(way) for way in ways],
    )


def _delete(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
