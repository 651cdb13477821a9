"""How often a plan's interval holds in a running daemon: restores from host memory and from disk.

    python -m benchmarks.eta_live [--json] [--restores 2400] [--folder /var/tmp] [--seed 1]

Three service processes, and a worker in this one with the geometry of Llama 3.2 1B in bf16 and blocks of 64
tokens: 2 MiB each.  Conversations of 4 to 64 blocks, log-uniform, are parked on disk; together they are four
times the arena, so that what was not used of late comes from the drive.  Half of the restores take up one of
the last ones, which host memory still has, half the one that was taken up longest ago; the plan says where
its bytes come from, and the slower source counts.

Quiet phases take one restore after the other.  In busy ones they come in a Poisson stream, up to four at a
time, and every sixth arrival is a park of up to 16 new blocks to disk.  A restore counts as loaded when
another one or a park was under way as it was planned.  Its time runs in this process, from the call until the
receipt is there.  Every restore counts, from the first on.  The figures are those of benchmarks/eta.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.eta import Outcome, report
from kvtier.bench.lines import Line, table
from kvtier.bench.memory import faulted
from kvtier.client.client import Client, connect
from kvtier.client.handles import ParkHandle, RestoreHandle
from kvtier.client.worker import Worker
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool
from kvtier.model.fingerprint import Fingerprint
from kvtier.objects import Shard
from kvtier.policy.intervals import Interval
from kvtier.policy.load_cost import LoadEstimate, Path
from kvtier.testing.service_processes import ServiceProcesses
from kvtier.waiting import wait_until

LAYERS, HEADS, DIM, PAGE_TOKENS, BLOCK_TOKENS = 16, 8, 64, 16, 64
BLOCK_BYTES = LAYERS * 2 * HEADS * DIM * 2 * BLOCK_TOKENS
_BLOCK_PAGES = BLOCK_TOKENS // PAGE_TOKENS
_LEAST_BLOCKS, _MOST_BLOCKS = 4, 64
_PARK_BLOCKS, _LANES = 16, 4
_ARENA_BYTES, _DISK_BYTES = 768 << 20, 6 << 30
_CONVERSATIONS, _RECENT = 72, 5
_PHASE, _BUSY, _PARK_SHARE = 60, 0.7, 1 / 6
_WAIT_S, _PAUSE_S = 60.0, 0.002
_ANSWER_S = 10.0


@dataclass(slots=True)
class _Running:
    """A restore under way. ended_s: set by the worker's thread."""

    handle: RestoreHandle
    estimate: LoadEstimate
    begun_s: float
    lane: int
    ended_s: list[float] = field(default_factory=list)


class Load:
    """Conversations, and what is under way of them."""

    def __init__(self, worker: Worker, seed: int) -> None:
        self._worker = worker
        self._random = np.random.default_rng(seed)
        least, most = math.log(_LEAST_BLOCKS), math.log(_MOST_BLOCKS)
        blocks = np.exp(self._random.uniform(least, most, _CONVERSATIONS))
        # The one that was used longest ago first.
        self._chats = [(f"chat-{n}", self._text(round(size))) for n, size in enumerate(blocks)]
        self._numbers = itertools.count()
        self._lanes = list(range(_LANES))
        self._running: list[_Running] = []
        self._park: ParkHandle | None = None
        self._service_s = 0.05
        self.outcomes: list[Outcome] = []

    def _text(self, blocks: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return self._random.integers(0, 1 << 20, blocks * BLOCK_TOKENS, np.uint32)

    def park_all(self) -> None:
        """Every conversation on disk."""
        for name, tokens in self._chats:
            handle = self._worker.park(name, tokens, _pages(0, len(tokens)), level="disk")
            receipt = handle.result(timeout_s=_WAIT_S)
            if not receipt.ok:
                raise RuntimeError(f"a park failed: {receipt}")

    def run(self, restores: int) -> None:
        """So many restores, in quiet and busy phases by turns."""
        for number in range(restores):
            if number // _PHASE % 2:
                time.sleep(float(self._random.exponential(self._service_s / _BUSY)))
                if self._random.random() < _PARK_SHARE:
                    self._begin_park()
            else:
                self._settle(0)
                self._end_park()
                time.sleep(float(self._random.exponential(_PAUSE_S)))
            self._settle(_LANES - 1)
            self._begin()
        self._settle(0)
        self._end_park()

    def _begin(self) -> None:
        recent = self._random.random() < 0.5
        place = len(self._chats) - 1 - int(self._random.integers(_RECENT)) if recent else 0
        name, tokens = self._chats.pop(place)
        loaded = bool(self._running) or (self._park is not None and not self._park.done())
        plan = self._worker.plan(name, tokens)
        self._chats.append((name, tokens))
        if plan.load_tokens != len(tokens):
            raise RuntimeError(f"{name} is not all there: {plan}")
        source = "disk" if any(part.source == "disk" for part in plan.ranges) else "host"
        eta = Interval(plan.eta_s[0], plan.eta_mid_s, plan.eta_s[1])
        estimate = LoadEstimate(Path(source), plan.bytes, int(loaded), eta)
        lane = self._lanes.pop()
        begun_s = time.perf_counter()
        handle = self._worker.restore_async(plan, _pages(lane, len(tokens)), deadline_s=_WAIT_S)
        running = _Running(handle, estimate, begun_s, lane)
        handle.when_done(lambda: running.ended_s.append(time.perf_counter()))
        self._running.append(running)

    def _settle(self, most: int) -> None:
        """Wait until at most so many restores are under way; what ended is an outcome."""
        for running in list(self._running):
            if len(self._running) <= most and not running.handle.done():
                continue
            receipt = running.handle.result(timeout_s=_WAIT_S)
            if not receipt.ok or not wait_until(lambda r=running: bool(r.ended_s), _ANSWER_S):  # type: ignore[misc]
                raise RuntimeError(f"a restore failed: {receipt}")
            seconds = running.ended_s[0] - running.begun_s
            self.outcomes.append(Outcome(running.estimate, seconds))
            self._service_s += 0.05 * (seconds / max(len(self._running), 1) - self._service_s)
            self._running.remove(running)
            self._lanes.append(running.lane)

    def _begin_park(self) -> None:
        if self._park is None or self._park.done():
            tokens = self._text(int(self._random.integers(1, _PARK_BLOCKS + 1)))
            name = f"new-{next(self._numbers)}"
            self._park = self._worker.park(name, tokens, _pages(_LANES, len(tokens)), level="disk")

    def _end_park(self) -> None:
        if self._park is not None:
            self._park.result(timeout_s=_WAIT_S)


def _pages(lane: int, tokens: int) -> list[int]:
    """The first pages of a lane; the one after the last lane is for parks."""
    first = lane * _MOST_BLOCKS * _BLOCK_PAGES
    return list(range(first, first + -(-tokens // PAGE_TOKENS)))


def attach(client: Client) -> Worker:
    """A worker with a pool of `_LANES` of the longest conversation, and one for parks."""
    blocks = _LANES * _MOST_BLOCKS + _PARK_BLOCKS
    memory = faulted(blocks * BLOCK_BYTES)
    tensors = memory.view(np.uint16).reshape(LAYERS, 2, blocks * _BLOCK_PAGES, PAGE_TOKENS, HEADS, DIM)
    layout = paged(
        [(layer[0], layer[1]) for layer in tensors], "page token head dim", block_tokens=BLOCK_TOKENS
    )
    model = Fingerprint.of_revision(
        "eta@1", {"model_type": "llama"}, kv_dtype="bfloat16", layout=layout.layout_id
    )
    pool = Pool(layout, [tensor for layer in tensors for tensor in (layer[0], layer[1])])
    return client.attach(model, pool, shard=Shard(0, LAYERS, 0, HEADS), call_timeout_s=_ANSWER_S)


def run(restores: int, folder: str, seed: int) -> Iterator[Line]:
    """All lines."""
    settings = {
        "host.capacity_bytes": _ARENA_BYTES,
        "disk.capacity_bytes": _DISK_BYTES,
        "disk.segment_bytes": 256 << 20,
        "policy.restore": "cost",
    }
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-eta-", dir=folder) as place,
        ServiceProcesses(place, settings) as services,
        connect(services.socket_path) as client,
    ):
        services.wait_faulted(client)
        with attach(client) as worker:
            load = Load(worker, seed)
            load.park_all()
            load.run(restores)
        counters = client.status().counters
    by_path = [[o for o in load.outcomes if o.estimate.path.source == s] for s in ("host", "disk")]
    detail = {
        "restores": restores,
        "seed": seed,
        "load_average": round(os.getloadavg()[0], 1),
        "node_counted": {name: counters[f"eta.{name}"] for name in ("inside", "early", "late")},
    }
    for number, line in enumerate(report(by_path)):
        yield line if number else Line(line.name, line.value, line.unit, line.limit, None, detail)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--restores", type=int, default=2400)
    parser.add_argument("--folder", default="/var/tmp")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = list(run(options.restores, options.folder, options.seed))
    print("\n".join(line.json() for line in lines) if options.json else table(lines))


if __name__ == "__main__":
    main()
