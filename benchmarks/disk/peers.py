"""The same work with other systems' disk tiers, in one run: durable parks and cold restores, alternately.

What is measured of each is the way between its own host memory and the drive.  Of Mooncake Store it is the
way from a put and to the caller's memory, since its client offers no other.  Nobody but kvtier checks what it
reads while the time runs; what the others bring is compared afterwards.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.disk.peer_process import LMCache, Missed, Mooncake
from kvtier.bench.disk import BLOCK_BYTES, CONVERSATIONS, delete, restore_all
from kvtier.bench.drive import Drive, Way, device_read_bytes, forget_page_cache
from kvtier.bench.lines import Line, seconds
from kvtier.bench.memory import Bytes, pages_kind
from kvtier.bench.store import blocks_of, meta_of, opened, park, sums_of

MiB = 1 << 20
# The quickest of the many that the group `large` tries.
_DRIVE = Way(True, 8 * MiB, 8)
_WORKS = (
    "durable park of one conversation",
    "cold restore of one conversation",
    "cold restore of eight at once",
)


class Contender(Protocol):
    """Parks durably and restores from the drive; each call answers seconds and bytes read from it."""

    def park(self) -> float: ...

    def restore(self, at_once: int) -> tuple[float, int]: ...

    def clear(self) -> None: ...


@dataclass(slots=True)
class Took:
    """Seconds by round, None where not everything came through, and what part was read from the device."""

    seconds: list[float | None] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    missed: str = ""


class Raw:
    """The drive itself: one file, by the quickest way known."""

    def __init__(self, drive: Drive, folder: Path) -> None:
        self._drive, self._folder = drive, folder

    def park(self) -> float:
        """See Contender."""
        self._drive.renew()
        return seconds(lambda: self._drive.write(_DRIVE))

    def restore(self, at_once: int) -> tuple[float, int]:
        """See Contender."""
        forget_page_cache(self._folder)
        before = device_read_bytes()
        took = seconds(lambda: self._drive.read(_DRIVE))
        return took, device_read_bytes() - before

    def clear(self) -> None:
        """See Contender."""


class Kvtier:
    """The disk tier with one store for all rounds, as a daemon has: its room is used again and again.

    Like the others it has done everything once before it is measured.
    """

    def __init__(self, memory: Bytes, folder: Path) -> None:
        self._blocks = blocks_of(memory, BLOCK_BYTES)
        self._sums = sums_of(self._blocks)
        self._folder = folder / "kvtier"
        self._numbers = range(0)

    def __enter__(self) -> Kvtier:
        self._opened = opened(self._folder, 2 * sum(block.nbytes for block in self._blocks))
        self._tier = self._opened.__enter__()
        self.park()
        self.restore(CONVERSATIONS)
        self.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__(None, None, None)
        delete(self._folder)

    def park(self) -> float:
        """See Contender."""
        self._numbers = range(self._numbers.stop, self._numbers.stop + len(self._blocks))
        return seconds(lambda: park(self._tier, self._numbers, self._blocks, self._sums))

    def restore(self, at_once: int) -> tuple[float, int]:
        """See Contender."""
        for block in self._blocks:
            block[:64] = 0
        forget_page_cache(self._folder)
        before = device_read_bytes()
        took = seconds(lambda: restore_all(self._tier, self._numbers, self._blocks, at_once))
        return took, device_read_bytes() - before

    def clear(self) -> None:
        """See Contender."""
        for number in self._numbers:
            self._tier.remove(meta_of(number, BLOCK_BYTES).object_id)
        self._tier.commit([])


def peers(
    folder: Path, nbytes: int, rounds: int, lmcache: Path | None, mooncake: Path | None
) -> Iterator[Line]:
    """Lines of kvtier against each peer whose Python is given, and against the drive."""
    chunks = nbytes // BLOCK_BYTES
    drive = Drive(folder, nbytes)
    with ExitStack() as stack:
        stack.callback(drive.close)
        own = stack.enter_context(Kvtier(drive.memory, folder))
        contenders: dict[str, Contender] = {"drive": Raw(drive, folder), "kvtier": own}
        if lmcache is not None:
            for name, direct in (
                ("LMCache fs_native, O_DIRECT", True),
                ("LMCache fs_native, buffered", False),
            ):
                made = LMCache(lmcache, folder / name.replace(" ", ""), chunks, direct=direct)
                contenders[name] = stack.enter_context(made)
        if mooncake is not None:
            client = Mooncake(mooncake, folder / "mooncake", chunks)
            contenders["Mooncake file_per_key"] = stack.enter_context(client)
        took = {name: {work: Took() for work in _WORKS} for name in contenders}
        draw = random.Random(rounds)
        for number in range(rounds):
            # Nobody always comes after the same other.
            for name in draw.sample(list(contenders), len(contenders)):
                os.sync()
                _one_round(contenders[name], took[name], nbytes, number)
    for name in took:
        yield from _lines(name, took, nbytes)


def _one_round(contender: Contender, took: dict[str, Took], nbytes: int, number: int) -> None:
    try:
        took[_WORKS[0]].seconds.append(contender.park())
        for work, at_once in zip(_WORKS[1:], (1, CONVERSATIONS), strict=True):
            spent, read = contender.restore(at_once)
            took[work].seconds.append(spent)
            took[work].cold.append(read / nbytes)
    except Missed as problem:
        for each in took.values():
            each.missed = str(problem)
    for each in took.values():
        each.seconds += [None] * (number + 1 - len(each.seconds))
    contender.clear()


def _lines(name: str, took: dict[str, dict[str, Took]], nbytes: int) -> Iterator[Line]:
    """Of one contender: GB/s, and how many times as fast kvtier is, as the median of the rounds' ratios."""
    for work in _WORKS:
        own, ours = took[name][work], took["kvtier"][work]
        pairs = [(t, m) for t, m in zip(own.seconds, ours.seconds, strict=True) if t and m]
        detail: dict[str, Any] = {"bytes": nbytes, "rounds": len(pairs), "memory": pages_kind()}
        if own.missed:
            detail["missed"] = own.missed
        if own.cold:
            detail["read_from_device"] = round(statistics.median(own.cold), 3)
        if name != "kvtier" and pairs:
            ratios = [theirs / mine for theirs, mine in pairs]
            detail["kvtier_is_faster_by"] = round(statistics.median(ratios), 2)
            detail["ratios"] = [round(ratio, 2) for ratio in ratios]
        rate = nbytes / statistics.median(theirs for theirs, _ in pairs) / 1e9 if pairs else 0.0
        yield Line(f"{name}: {work}", round(rate, 2), "GB/s", detail=detail)


def skipped(lmcache: Path | None, mooncake: Path | None) -> list[str]:
    """What is not compared, and what to give for it."""
    said = []
    if lmcache is None:
        said.append("LMCache is skipped: give --lmcache-python, a Python with lmcache and torch")
    if mooncake is None:
        said.append("Mooncake is skipped: give --mooncake-python, one with mooncake-transfer-engine-non-cuda")
    return said
