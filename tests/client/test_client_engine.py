"""A worker with the real CPU engine and arena; and one whose pool the node copies by itself."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.gpu import describe
from kvtier.gpu.shared_pool import SharedMemory, SharedPool
from kvtier.messages.calls import Attach, Attached, Park, ParkDone, Released, Restore, RestoreDone
from kvtier.messages.tiers import Copied
from kvtier.receipts import ParkReceipt, RestoreReceipt

TOKENS = list(range(32))


def test_bytes_go_to_the_slot_and_back(kit):
    rng = np.random.default_rng(5)
    for memory in kit.pool.memory:
        memory[:] = rng.integers(0, 256, memory.size, dtype=np.uint8)
    with kit.connect() as kv, kv.attach(kit.model, kit.pool, shard=kit.shard) as worker:
        kit.node.peer("client")
        control, events, copy = (kit.node.peer(role) for role in ("client", "events", "copy"))
        kit.node.arena.publish(0, 1)
        handle = worker.park("c", TOKENS, [3, 1])
        sent = control.next(Park)
        copy.send(kit.copy(sent, "j"))
        answer = copy.next(Copied)
        batch = kit.copy(sent, "j").items[0]
        slot = kit.node.arena.view((0, 0), batch.nbytes)
        assert answer.ok and answer.checksums == [checksum(slot.tobytes())]
        assert np.any(slot)
        events.send(Released(request=sent.request))
        assert handle.released.wait(10)

        before = [memory.copy() for memory in kit.pool.memory]
        for memory in kit.pool.memory:
            memory[:] = 0
        got = worker.restore_async(worker.plan("c", TOKENS), [3, 1], deadline_s=30)
        asked = control.next(Restore)
        item = batch.__class__(0, 0, 32, 0, 0, 1, 0, 0, batch.nbytes, answer.checksums[0])
        copy.send(kit.copy(asked, "k", items=[item]))
        assert copy.next(Copied).ok
        events.send(RestoreDone(request=asked.request, receipt=RestoreReceipt("c", "default", 32, 32)))
        assert got.result(10).ok
        for memory, old in zip(kit.pool.memory, before, strict=True):
            pages, was = memory.reshape(8, -1), old.reshape(8, -1)
            assert np.array_equal(pages[[1, 3]], was[[1, 3]])
            assert not pages[[0, 2, 4, 5, 6, 7]].any()

        kit.node.arena.publish(0, 2)
        handle = worker.park("c", TOKENS, [3, 1])
        copy.send(kit.copy(control.next(Park), "stale"))
        assert copy.next(Copied).failed == [(0, "stale")]
        handle.cancel()
        assert handle.released.wait(10)
    kit.node.arena.publish(0, 0)


@pytest.fixture
def shared(kit):
    memory = SharedMemory.create(1 << 16)
    tensors = [memory.array((8, 16, 2, 8), np.float16) for _ in range(2)]
    layout = describe.paged([tensors], "page token head dim", block_tokens=32)
    pool = SharedPool.create(layout, memory)

    def attach(peer, message):
        answer = Attached(
            id=message.id,
            worker="w",
            arena_bytes=[1 << 20],
            generation_slots=64,
            gpu_socket=kit.node.gpu_path,
            mode="shared",
        )
        peer.send(answer, kit.node.arena.fds)

    kit.node.answers[Attach] = attach
    with kit.connect() as kv, kv.attach(kit.model, pool, shard=kit.shard) as worker:
        yield kit, worker
    pool.close()


def test_a_shared_pool_travels_as_page_ids(shared):
    kit, worker = shared
    kit.node.peer("client")
    control, events = kit.node.peer("client"), kit.node.peer("events")
    handle = worker.park("c", TOKENS, [3, 1])
    sent = control.next(Park)
    assert np.frombuffer(sent.pages[0], "<u4").tolist() == [3, 1]
    events.send(Released(request=sent.request))
    assert handle.released.wait(10)
    events.send(ParkDone(request=sent.request, receipt=ParkReceipt("c", "default", "host", "host", True)))
    assert handle.result(10).ok


def test_a_shared_pool_is_not_released_by_the_loss_of_its_node(shared):
    kit, worker = shared
    handle = worker.park("c", TOKENS, [3, 1])
    restore = worker.restore_async(worker.plan("c", TOKENS), [5, 6], deadline_s=30)
    kit.node.drop("events")
    assert handle.result(10).reason == "daemon_unavailable"
    assert not handle.released.is_set() and not handle.result(0).released
    assert restore.result(10).busy == (5, 6)
