"""Blocks through aiofiles, against threads with preadv and pwritev: the same bytes, the same memory, no copy.

aiofiles has no call with an offset and none with several buffers, so each request in flight needs a handle of
its own and is a seek and a readinto or write, each a trip from the event loop to a thread and back.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import aiofiles  # type: ignore[import-untyped]

from kvtier.bench.disk import alternate_rounds
from kvtier.bench.drive import Drive, Way, forget_page_cache
from kvtier.bench.lines import Line, rate_line, seconds
from kvtier.bench.memory import Bytes

KiB, MiB = 1 << 10, 1 << 20
_SIZES = {"8 MiB": 8 * MiB, "64 KiB": 64 * KiB}
_AT_ONCE = 8
_LARGEST_TOTAL = 256 * MiB

Work = Callable[[Any, Bytes], Awaitable[object]]


def async_files(folder: Path, nbytes: int, rounds: int) -> Iterator[Line]:
    """GB/s of aiofiles with O_DIRECT and no copy; the limit is threads with preadv and pwritev."""
    drive = Drive(folder, min(nbytes, _LARGEST_TOTAL))
    try:
        for name, size in _SIZES.items():
            way = Way(True, size, _AT_ONCE)
            for what, own, limit in (
                ("durable writes", partial(_write, drive, size), partial(_write_by_threads, drive, way)),
                ("cold reads", partial(_read, drive, size), partial(_read_by_threads, drive, way)),
            ):
                spent: dict[str, float] = {}
                calls = (
                    [partial(_counted, spent, "threads", limit)],
                    partial(_counted, spent, "aiofiles", own),
                )
                limits, works = alternate_rounds(*calls, rounds)
                detail = {
                    f"{who}_cpu_s_per_gb": cpu_s for who, cpu_s in _per_gb(spent, drive, rounds).items()
                }
                yield rate_line(
                    f"aiofiles, {what} of {name} x {_AT_ONCE}", drive.nbytes, limits[0], works, **detail
                )
    finally:
        drive.close()


def _counted(spent: dict[str, float], who: str, call: Callable[[], float]) -> float:
    """Add the processor time that a call takes; answers the seconds that it answers."""
    begun = time.process_time()
    took = call()
    spent[who] = spent.get(who, 0.0) + time.process_time() - begun
    return took


def _per_gb(spent: dict[str, float], drive: Drive, rounds: int) -> dict[str, float]:
    return {who: round(cpu_s / rounds / drive.nbytes * 1e9, 3) for who, cpu_s in spent.items()}


def _write_by_threads(drive: Drive, way: Way) -> float:
    drive.renew()
    return seconds(lambda: drive.write(way))


def _read_by_threads(drive: Drive, way: Way) -> float:
    forget_page_cache(drive.path.parent)
    return seconds(lambda: drive.read(way))


def _write(drive: Drive, size: int) -> float:
    drive.renew()
    return seconds(
        lambda: asyncio.run(_all(drive, size, "r+b", lambda file, part: file.write(part), flush=True))
    )


def _read(drive: Drive, size: int) -> float:
    forget_page_cache(drive.path.parent)
    return seconds(
        lambda: asyncio.run(_all(drive, size, "rb", lambda file, part: file.readinto(part), flush=False))
    )


async def _all(drive: Drive, size: int, mode: str, work: Work, *, flush: bool) -> None:
    """Every part of the file, by as many handles as requests may be under way."""
    starts = iter(range(0, drive.nbytes, size))
    with ThreadPoolExecutor(_AT_ONCE) as pool:

        async def some() -> None:
            async with aiofiles.open(drive.path, mode, buffering=0, opener=_direct, executor=pool) as file:
                for at in starts:
                    part = drive.memory[at : at + size]
                    await file.seek(at)
                    if await work(file, part) != part.nbytes:
                        raise OSError(f"a short transfer at {at}")

        await asyncio.gather(*(some() for _ in range(_AT_ONCE)))
        if flush:
            await asyncio.get_running_loop().run_in_executor(pool, _flush, drive.path)


def _direct(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_DIRECT)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
