"""How often an expected interval holds for real loads on this machine: copies in memory, reads from its disk.

    python -m benchmarks.eta_live [--restores 2400] [--folder /var/tmp] [--seed 1]

Each path has one thread that serves loads in turn: 'host' copies from one buffer to another, 'disk' reads a
file with O_DIRECT.  Loads come in a Poisson stream that is quiet and busy by turns, with lognormal sizes; a
load's time runs from its being asked for to its end.  The figures are those of benchmarks/eta.py.
"""

from __future__ import annotations

import argparse
import mmap
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from benchmarks.eta import Outcome, report
from kvtier.policy.load_cost import LoadCosts, LoadEstimate, Path

_FILE_BYTES, _MOST_BYTES, _ALIGN = 384 << 20, 192 << 20, 4096
_MEDIAN_BYTES, _SIZE_SPREAD = 24 << 20, 1.2
_PHASE_RESTORES, _QUIET, _BUSY = 60, 0.35, 0.85
_END = -1


@dataclass(frozen=True, slots=True)
class Ended:
    """A load that was served, and when."""

    number: int
    ended_s: float


class Server(threading.Thread):
    """Serves loads of one path in turn."""

    def __init__(self, serve: Callable[[int], object]) -> None:
        super().__init__()
        self._serve = serve
        self.asked: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()

    def run(self) -> None:
        """Serve until the end is asked for."""
        while (request := self.asked.get())[0] != _END:
            number, nbytes = request
            self._serve(nbytes)
            self.ended.put(Ended(number, time.perf_counter()))


def measure(
    costs: LoadCosts, path: Path, serve: Callable[[int], object], restores: int, seed: int
) -> list[Outcome]:
    """The outcomes of so many loads."""
    random = np.random.default_rng(seed)
    begun = time.perf_counter()
    for _ in range(20):
        serve(_MEDIAN_BYTES)
    mean_s = (time.perf_counter() - begun) / 20 * np.exp(_SIZE_SPREAD**2 / 2)
    server = Server(serve)
    server.start()
    waiting: dict[int, tuple[LoadEstimate, float]] = {}
    outcomes: dict[int, Outcome] = {}

    def learn(ended: Ended) -> None:
        estimate, asked_s = waiting.pop(ended.number)
        outcomes[ended.number] = Outcome(estimate, ended.ended_s - asked_s)
        costs.observed(estimate, ended.ended_s - asked_s)

    for number in range(restores):
        usage = _BUSY if number // _PHASE_RESTORES % 2 else _QUIET
        time.sleep(float(random.exponential(mean_s / usage)))
        while not server.ended.empty():
            learn(server.ended.get())
        nbytes = int(min(random.lognormal(np.log(_MEDIAN_BYTES), _SIZE_SPREAD), _MOST_BYTES))
        nbytes = max(nbytes // _ALIGN, 1) * _ALIGN
        ahead = sum(estimate.nbytes for estimate, _ in waiting.values())
        waiting[number] = costs.estimate(path, nbytes, ahead), time.perf_counter()
        server.asked.put((number, nbytes))
    server.asked.put((_END, 0))
    server.join()
    while waiting:
        learn(server.ended.get())
    return [outcomes[number] for number in range(restores)]


@contextmanager
def disk_reader(folder: str, seed: int) -> Iterator[Callable[[int], object]]:
    """Reads of the first so many bytes after a random place of a file, past the page cache."""
    random = np.random.default_rng(seed)
    buffer = mmap.mmap(-1, _MOST_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        piece = random.integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
        for _ in range(_FILE_BYTES >> 20):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)

        def read(nbytes: int) -> None:
            place = int(random.integers(0, (_FILE_BYTES - nbytes) // _ALIGN + 1)) * _ALIGN
            with memoryview(buffer) as view, view[:nbytes] as target:
                done = os.preadv(descriptor, [target], place)
            if done != nbytes:
                raise OSError(f"read {done} of {nbytes} bytes")

        try:
            yield read
        finally:
            os.close(descriptor)
    buffer.close()


def memory_copier(seed: int) -> Callable[[int], object]:
    """Copies of so many bytes between two buffers that are faulted in."""
    random = np.random.default_rng(seed)
    source = np.ones(_FILE_BYTES, dtype=np.uint8)
    target = np.zeros(_MOST_BYTES, dtype=np.uint8)

    def copy(nbytes: int) -> None:
        place = int(random.integers(0, _FILE_BYTES - nbytes + 1))
        np.copyto(target[:nbytes], source[place : place + nbytes])

    return copy


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--restores", type=int, default=2400)
    parser.add_argument("--folder", default="/var/tmp")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    costs, half = LoadCosts(), options.restores // 2
    host = measure(costs, Path("host"), memory_copier(options.seed), half, options.seed)
    with disk_reader(options.folder, options.seed) as read:
        disk = measure(costs, Path("disk"), read, half, options.seed + 1)
    for line in report([host, disk]):
        print(line.json(), flush=True)


if __name__ == "__main__":
    main()
