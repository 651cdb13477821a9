"""A pool mapped by two sides: attach in another process, probe, malformed descriptions."""

from __future__ import annotations

import copy
import fcntl
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import pytest

from kvtier.errors import GeometryError
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.describe import cross_layer, paged
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult
from kvtier.gpu.layout import LayerGroup
from kvtier.gpu.pool import Pool
from kvtier.gpu.shared_pool import Answer, PoolProbe, SharedMemory, SharedPool, probe_answer

P, PAGES = 4, 16
SHAPE = (PAGES, P, 2, 8)


@pytest.fixture
def shared() -> Iterator[SharedPool]:
    memory = SharedMemory.create(1 << 16)
    tensors = [memory.array(SHAPE, np.uint16) for _ in range(4)]
    layout = paged([tuple(tensors[:2]), tuple(tensors[2:])], "page token head dim", block_tokens=16)
    pool = SharedPool.create(layout, memory)
    yield pool
    pool.close()


def attach(shared: SharedPool) -> SharedPool:
    description, fds = shared.export()
    return SharedPool.attach(description, [os.dup(fd) for fd in fds])


def test_both_sides_see_the_same_bytes(shared: SharedPool) -> None:
    other = attach(shared)
    assert other.pool.layout == shared.pool.layout
    for mine, theirs in zip(shared.pool.memory, other.pool.memory, strict=True):
        mine[:] = np.arange(mine.size, dtype=np.uint8)
        assert (theirs == mine).all()
        theirs[5] = 99
        assert mine[5] == 99
    other.close()


def test_the_actors_engine_moves_the_workers_pages(shared: SharedPool) -> None:
    class Slot:
        bytes = np.zeros(16 * 2 * 64, np.uint8)

        def view(self, address: tuple[int, int], nbytes: int) -> np.ndarray:
            return self.bytes[:nbytes]

        def generation(self, slot_id: int) -> int:
            return 1

    actor, slot = attach(shared), Slot()
    for i, memory in enumerate(shared.pool.memory):
        memory[:] = np.random.default_rng(i).integers(0, 256, memory.size, dtype=np.uint8)
    engine = CpuCopyEngine(slot, threads=1)
    try:
        item = CopyItem(0, 0, 16, 0, 0, 1, (0, 0), slot.bytes.size)
        results: list[CopyResult] = []
        batch = CopyBatch("j", 0, "gather", actor.pool.bind([3, 1, 2, 9]), (item,))
        engine.submit(batch, results.append)
        assert engine.wait_idle(10) and results[0].ok
    finally:
        engine.close()
        actor.close()
    wanted = b"".join(m.reshape(PAGES, -1)[[3, 1, 2, 9]].tobytes() for m in shared.pool.memory)
    assert slot.bytes.tobytes() == wanted


def _actor(pipe: Connection) -> None:
    description, fd, challenge = pipe.recv()
    pool = SharedPool.attach(description, [fd.detach()])
    pipe.send(probe_answer(pool.pool, challenge))
    pool.close()


def test_the_probe_succeeds_across_processes(shared: SharedPool) -> None:
    probe = PoolProbe()
    challenge = probe.challenge(shared.pool, [4, 11])
    description, fds = shared.export()
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_actor, args=(there,))
    process.start()
    try:
        here.send((description, DupFd(fds[0]), challenge))
        assert here.poll(30)
        answer = here.recv()
    finally:
        process.join(30)
        if process.is_alive():
            process.kill()
    assert probe.judge(shared.pool, answer)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "fault", ["other memory", "actor cannot write", "repeats the challenge", "other pages"]
)
def test_the_probe_fails_where_sides_differ(shared: SharedPool, fault: str) -> None:
    probe = PoolProbe()
    challenge = probe.challenge(shared.pool, [4, 11])
    actor = attach(shared)
    if fault == "other memory":
        copies = [memory.copy() for memory in actor.pool.memory]
        answer = probe_answer(Pool(actor.pool.layout, copies), challenge)
    elif fault == "actor cannot write":
        copies = [memory.copy() for memory in actor.pool.memory]
        answer = probe_answer(Pool(actor.pool.layout, copies), challenge)
        seen = probe_answer(attach_memory(actor), challenge).seen
        answer = Answer(seen, answer.written)
    elif fault == "repeats the challenge":
        seen = probe._digest
        answer = Answer(seen, seen)
    else:
        answer = probe_answer(actor.pool, replace(challenge, pages=(4, 12)))
    assert not probe.judge(shared.pool, answer)
    assert not PoolProbe().judge(shared.pool, answer)
    actor.close()


def attach_memory(pool: SharedPool) -> Pool:
    """A copy of the pool's memory: reads what is there, writes elsewhere."""
    return Pool(pool.pool.layout, [memory.copy() for memory in pool.pool.memory])


def test_probe_pages_are_checked(shared: SharedPool) -> None:
    for wrong in ([], [PAGES], [1, 1]):
        with pytest.raises(GeometryError):
            PoolProbe().challenge(shared.pool, wrong)


def test_the_memory_cannot_change_its_size(shared: SharedPool) -> None:
    fd = shared.memory.fd
    for size in (10, 1 << 20):
        with pytest.raises(OSError):
            os.ftruncate(fd, size)
    with pytest.raises(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def _broken(description: dict[str, Any], how: str) -> dict[str, Any]:
    broken = copy.deepcopy(description)
    plane = broken["layout"]["planes"][0][0]
    if how == "version":
        broken["version"] = 2
    elif how == "size":
        broken["nbytes"] += 1
    elif how == "buffer past the end":
        broken["offsets"][0] = broken["nbytes"] - 8
    elif how == "negative offset":
        broken["offsets"][0] = -4096
    elif how == "plane past its buffer":
        plane["pages"] += 1
    elif how == "empty plane":
        plane["strips"] = 0
    elif how == "endless page":
        plane["strips"] = 1 << 50
    elif how == "another field":
        plane["colour"] = 1
    elif how == "no planes":
        broken["layout"]["planes"] = [[]]
    elif how == "no layout":
        del broken["layout"]
    elif how == "text for a number":
        plane["row_bytes"] = "many"
    else:
        plane["buffer"] = 77
    return broken


MALFORMED = (
    "version, size, buffer past the end, negative offset, plane past its buffer, empty plane, endless page, "
    "another field, no planes, no layout, text for a number, buffer that is not there"
)


@pytest.mark.parametrize("how", MALFORMED.split(", "))
def test_a_description_that_does_not_fit_is_refused(shared: SharedPool, how: str) -> None:
    description, fds = shared.export()
    fd = os.dup(fds[0])
    with pytest.raises(GeometryError):
        SharedPool.attach(_broken(description, how), [fd])
    with pytest.raises(OSError):
        os.fstat(fd)


def test_memory_that_is_not_sealed_is_refused(shared: SharedPool) -> None:
    description, _ = shared.export()
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, shared.memory.nbytes)
    with pytest.raises(GeometryError):
        SharedPool.attach(description, [fd])


def test_tensors_elsewhere_are_refused() -> None:
    memory = SharedMemory.create(1 << 14)
    try:
        away = np.zeros(SHAPE, np.uint16)
        with pytest.raises(GeometryError):
            SharedPool.create(paged([(away,)], "page token head dim", block_tokens=16), memory)
        memory.array((1 << 13,), np.uint8)
        with pytest.raises(GeometryError):
            memory.array(((1 << 13) + 1,), np.uint8)
        with pytest.raises(GeometryError):
            SharedMemory.create(0)
    finally:
        memory.close()


def test_groups_and_one_storage_travel(shared: SharedPool) -> None:
    memory = SharedMemory.create(1 << 16)
    storage = memory.array((PAGES, 3, 2, P, 1, 8), np.uint16)
    groups = (LayerGroup("full", (0, 2)), LayerGroup("sliding", (1,), 8))
    layout = cross_layer(storage, "page layer kv token head dim", block_tokens=16, groups=groups)
    mine = SharedPool.create(layout, memory)
    theirs = attach(mine)
    assert theirs.pool.layout.layout_id == layout.layout_id
    assert theirs.pool.layout.geometry == layout.geometry
    theirs.close()
    mine.close()
