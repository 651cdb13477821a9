"""The whole path: a worker of this process, and the daemon's services in processes of their own."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator

import numpy as np

from benchmarks.awake import CoresAwake
from benchmarks.echo import Echo
from kvtier.bench.lines import Line, alternate, micros_line, rate_line, seconds
from kvtier.bench.llama import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    HEADS,
    LAYERS,
    PAGE_TOKENS,
    contiguous_pool,
    scattered_pool,
)
from kvtier.bench.memory import CopyLimits, faulted
from kvtier.client.client import Client, connect
from kvtier.client.worker import Worker
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool
from kvtier.model.fingerprint import Fingerprint
from kvtier.objects import Shard
from kvtier.testing.service_processes import ServiceProcesses

_ROUNDS = 5
_PINGS, _IN_A_ROW, _LOOKUPS = 5000, 100, 200
_LOOKUP_TOKENS = 32768
_CALL_AIM_US, _LOOKUP_AIM_US = 60.0, 1000.0
_SPARE_BYTES = 128 << 20


def daemon(nbytes: int) -> Iterator[Line]:
    """Park and restore of `nbytes` between a pool and host memory, and what calls cost."""
    blocks = nbytes // BLOCK_BYTES
    memory, aside = faulted(blocks * BLOCK_BYTES), faulted(blocks * BLOCK_BYTES)
    memory.view(np.uint64)[:] = np.random.default_rng(1).integers(0, 1 << 63, memory.nbytes // 8, np.uint64)
    limits = CopyLimits(memory, aside)
    capacity_bytes = 2 * blocks * BLOCK_BYTES + _SPARE_BYTES
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        settings = {"host.capacity_bytes": capacity_bytes, "disk.enabled": False}
        with ServiceProcesses(folder, settings) as services, connect(services.socket_path) as client:
            services.wait_faulted(client)
            yield from _calls(client)
            for name, pool, pages in (
                ("scattered 16-token pages", *scattered_pool(memory, blocks)),
                ("contiguous 256-token blocks", *contiguous_pool(memory, blocks)),
            ):
                with _attach(client, pool) as worker:
                    yield from _park_and_restore(name, client, worker, pages, blocks, limits)
            yield from _lookups(client)
    limits.close()


def _attach(client: Client, pool: Pool) -> Worker:
    layout = pool.layout
    model = Fingerprint.of_revision(
        "bench@1", {"model_type": "llama"}, kv_dtype="bfloat16", layout=layout.layout_id
    )
    return client.attach(model, pool, shard=Shard(0, LAYERS, 0, HEADS))


def _park_and_restore(
    name: str, client: Client, worker: Worker, pages: list[int], blocks: int, limits: CopyLimits
) -> Iterator[Line]:
    tokens = np.random.default_rng(3).integers(0, 1 << 20, blocks * BLOCK_TOKENS, np.uint32)
    numbers = itertools.count()

    def forget() -> None:
        """So that each park finds an empty arena."""
        for known in list(client.conversations()):
            client.forget(known.conversation)

    def park() -> None:
        receipt = worker.park(f"bench-{next(numbers)}", tokens, pages).result(timeout_s=60)
        assert receipt.ok and receipt.objects_stored == blocks, receipt

    def restore() -> None:
        receipt = worker.restore(worker.plan(None, tokens), pages, deadline_s=60)
        assert receipt.ok and receipt.tokens == len(tokens), receipt

    limit, size = limits.copies_and_hashes(), blocks * BLOCK_BYTES
    took = alternate(limit, park, _ROUNDS, forget)
    yield rate_line(f"daemon park, {name}, with checksum", size, *took, limit_is="best copy and hash")
    took = alternate(limit, restore, _ROUNDS)
    yield rate_line(f"daemon restore, {name}, with checksum", size, *took, limit_is="best copy and hash")
    forget()


def _calls(client: Client) -> Iterator[Line]:
    """As the machine is, and with no core asleep: what is between is the time to wake a core."""
    yield _empty_call(client, "empty call over the socket")
    with CoresAwake():
        yield _empty_call(client, "empty call over the socket, no core asleep")


def _empty_call(client: Client, name: str) -> Line:
    pings: list[float] = []
    echoes: list[float] = []
    with Echo() as echo:
        for _ in range(_PINGS // _IN_A_ROW):
            echoes += [seconds(echo.there_and_back) for _ in range(_IN_A_ROW)]
            pings += [seconds(client.ping) for _ in range(_IN_A_ROW)]
    bare_us = round(statistics.median(echoes) * 1e6, 1)
    limit_is = "bare echo between two processes"
    return micros_line(name, pings, bare_us, limit_is=limit_is, aim_us=_CALL_AIM_US)


def _lookups(client: Client) -> Iterator[Line]:
    """Of a whole conversation, and of its next turn after a front that is known."""
    tokens = np.random.default_rng(4).integers(0, 1 << 20, _LOOKUP_TOKENS, np.uint32)
    turn = np.concatenate([tokens, tokens[:500]])
    small = np.zeros((_LOOKUP_TOKENS // PAGE_TOKENS, PAGE_TOKENS, 1, 8), np.uint16)
    pool = Pool(paged([(small,)], "page token head dim", block_tokens=BLOCK_TOKENS), [small])
    with _attach(client, pool) as worker:
        parked = worker.park("lookups", tokens, list(range(len(small)))).result(timeout_s=60)
        assert parked.ok, parked
        plan = worker.plan("lookups", tokens)
        assert plan.load_tokens == len(tokens), plan
        whole = [seconds(lambda: worker.plan("lookups", tokens)) for _ in range(_LOOKUPS)]
        known = [seconds(lambda: worker.plan("lookups", turn, after=plan.front)) for _ in range(_LOOKUPS)]
    yield micros_line("lookup of 32,768 tokens, 256-token blocks", whole, _LOOKUP_AIM_US, limit_is="aim")
    yield micros_line("lookup of the next turn of a known chain", known, _LOOKUP_AIM_US, limit_is="aim")
