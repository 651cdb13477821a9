"""Two processes on one GPU: the second mode works, and a worker's death gives everything back.

In a dry run both processes are views of one fake device.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.copies import gigabytes
from benchmarks.gpu.rig import DRY, Bench, conversations, pool_over, start, with_checksums
from kvtier.bench.lines import Line
from kvtier.gpu.cuda.ipc import MappedPool, Prober, export_pool
from kvtier.gpu.shared_pool import Answer, Challenge
from kvtier.testing.fake_device import FakeDevice

READY_S = 60.0
SCRATCH = (0, 3)


def worker(dry: bool, line: Connection) -> None:
    """The worker's process: a pool, its description, its side of the probe; then it waits to be killed."""
    bench = Bench(dry)
    with bench.memory(2 * bench.sizes.conversation_bytes) as memory:
        pool = pool_over(memory, bench.sizes, False)
        line.send(export_pool(bench.device, pool))
        prober = Prober(bench.device, pool)
        challenge = prober.challenge(SCRATCH)
        line.send((challenge.pages, challenge.nonce))
        seen, written = line.recv()
        line.send(prober.judge(Answer(seen, written)))
        line.recv()


def processes(bench: Bench) -> list[Line]:
    """Probe, park and restore across processes; memory before and after a worker's death in the middle."""
    if isinstance(bench.device, FakeDevice):
        return _in_one_process(bench)
    lines = []
    # The driver loads kernels, and takes memory for them, when they are first launched.
    _warm(bench)
    before = bench.device.memory_info()[0]
    for direction in ("gather", "scatter"):
        lines += _with_worker(bench, direction)
    deadline = time.monotonic() + 10
    while bench.device.memory_info()[0] < before and time.monotonic() < deadline:
        time.sleep(0)
    lost = before - bench.device.memory_info()[0]
    lines.append(Line("device memory missing after two workers died", float(lost), "B", 0.0))
    return lines


def _warm(bench: Bench) -> None:
    nbytes, blocks = bench.sizes.conversation_bytes, bench.sizes.tokens // bench.sizes.block_tokens
    with (
        bench.arena(nbytes, blocks) as arena,
        bench.memory(2 * nbytes) as memory,
        bench.engine(arena, nbytes) as engine,
    ):
        what = conversations(pool_over(memory, bench.sizes, False), bench.sizes, 1)[0]
        what = with_checksums(what, start(engine, "gather", what, bench.sizes, verify=True).wait_checksums())
        start(engine, "scatter", what, bench.sizes, verify=True).wait()


def _with_worker(bench: Bench, direction: Any) -> list[Line]:
    sizes, spawn = bench.sizes, multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=worker, args=(bench.dry, theirs), daemon=True)
    child.start()
    if not ours.poll(READY_S):
        raise TimeoutError("the worker did not come up")
    mapped = MappedPool.attach(bench.device, ours.recv())
    pages, nonce = ours.recv()
    answer = Prober(bench.device, mapped.pool).answer(Challenge(tuple(pages), nonce))
    ours.send((answer.seen, answer.written))
    proven = bool(ours.recv())
    nbytes = sizes.conversation_bytes
    lines = [Line(f"probe across processes, before a {direction}", float(proven), "bool")]
    with (
        bench.arena(nbytes, sizes.tokens // sizes.block_tokens) as arena,
        bench.engine(arena, nbytes) as engine,
    ):
        what = conversations(mapped.pool, sizes, 1)[0]
        what = with_checksums(what, start(engine, "gather", what, sizes, verify=True).wait_checksums())
        took = start(engine, direction, what, sizes, verify=True).wait()
        lines.append(Line(f"{direction} across processes", gigabytes(nbytes, took), "GB/s"))
        job = start(engine, direction, what, sizes)
        child.kill()
        child.join()
        # The mapping keeps the dead worker's memory, so copies that run may end.
        engine.cancel("bench")
        job.over.wait(READY_S)
    mapped.close()
    return lines


def _in_one_process(bench: Bench) -> list[Line]:
    assert isinstance(bench.device, FakeDevice)
    actor = FakeDevice(gpu=bench.device.gpu)
    with bench.memory(2 * DRY.conversation_bytes) as memory:
        pool = pool_over(memory, DRY, False)
        mapped = MappedPool.attach(actor, export_pool(bench.device, pool))
        prober = Prober(bench.device, pool)
        answer = Prober(actor, mapped.pool).answer(prober.challenge(SCRATCH))
        proven = prober.judge(answer)
        mapped.close()
    return [Line("probe across processes", float(proven), "bool")]
