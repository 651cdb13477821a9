"""Two processes on one GPU: the second mode works, events of each order the other, and a worker's death gives
everything back.

In a dry run both processes are views of one fake device.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.copies import gigabytes
from benchmarks.gpu.rig import (
    DRY,
    Bench,
    Conversation,
    Sizes,
    conversations,
    pool_over,
    start,
    with_checksums,
)
from kvtier.bench.lines import Line
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.ipc import EventRing, MappedPool, PeerEvents, Prober, export_pool
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
        _follow(bench, line)


def _follow(bench: Bench, line: Connection) -> None:
    """Mark the worker's stream for the other side, and wait for the events that it names."""
    ring = EventRing(bench.device, 2)
    line.send((ring.handles(), ring.mark(bench.device.current_stream())))
    events = PeerEvents(bench.device, line.recv())
    while True:
        event = events.event(line.recv())
        event.synchronize()
        line.send(event.done())


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
    ring = EventRing(bench.device)
    ring.handles()
    ring.close()


def _with_worker(bench: Bench, direction: Any) -> list[Line]:
    sizes, spawn = bench.sizes, multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=worker, args=(bench.dry, theirs), daemon=True)
    child.start()
    # Its end is then an error here at once, and not a wait for what it does not say any more.
    theirs.close()
    if not ours.poll(READY_S):
        raise TimeoutError("the worker did not come up")
    mapped = MappedPool.attach(bench.device, ours.recv())
    pages, nonce = ours.recv()
    answer = Prober(bench.device, mapped.pool).answer(Challenge(tuple(pages), nonce))
    ours.send((answer.seen, answer.written))
    proven = bool(ours.recv())
    nbytes = sizes.conversation_bytes
    lines = [Line(f"probe across processes, before a {direction}", float(proven), "bool")]
    ring = EventRing(bench.device)
    handles, number = ours.recv()
    marks = PeerEvents(bench.device, handles)
    marks.event(number).synchronize()
    ours.send(ring.handles())
    with (
        bench.arena(nbytes, sizes.tokens // sizes.block_tokens) as arena,
        bench.engine(arena, nbytes) as engine,
    ):
        what = conversations(mapped.pool, sizes, 1)[0]
        what = with_checksums(what, start(engine, "gather", what, sizes, verify=True).wait_checksums())
        took = start(engine, direction, what, sizes, verify=True).wait()
        lines.append(Line(f"{direction} across processes", gigabytes(nbytes, took), "GB/s"))
        lines += _layers_across(engine, ring, ours, what, sizes) if direction == "scatter" else []
        job = start(engine, direction, what, sizes)
        child.kill()
        child.join()
        # The mapping keeps the dead worker's memory, so copies that run may end.
        engine.cancel("bench")
        job.over.wait(READY_S)
    marks.close()
    ring.close()
    mapped.close()
    return lines


def _layers_across(
    engine: CudaCopyEngine, ring: EventRing, line: Connection, what: Conversation, sizes: Sizes
) -> list[Line]:
    """The other process waits for each layer of a restore, by events of this one."""
    whole = replace(sizes, batch_items=len(what.items))
    begun = time.perf_counter()
    job = start(
        engine,
        "scatter",
        what,
        whole,
        verify=True,
        on_layer=lambda layer, event: line.send(ring.relay(event)),
    )
    came = []
    for _ in range(sizes.layers):
        if not line.poll(READY_S):
            raise TimeoutError("a layer's event was not reached in the other process")
        came.append((bool(line.recv()), time.perf_counter() - begun))
    took = job.wait()
    return [
        Line("layer events across processes", float(all(reached for reached, _ in came)), "bool"),
        Line("first layer ready in another process", came[0][1] * 1e3, "ms", detail={"all_ms": took * 1e3}),
    ]


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
    ring = EventRing(actor, 2)
    events = PeerEvents(bench.device, ring.handles())
    number = ring.relay(mark(actor, actor.current))
    events.event(number).synchronize()
    reached = events.event(number).done()
    events.close()
    ring.close()
    return [
        Line("probe across processes", float(proven), "bool"),
        Line("layer events across processes", float(reached), "bool"),
    ]
