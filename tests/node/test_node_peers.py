"""Workers and services that come, go, stop and die: what was begun ends, and no slot is reused too early."""

import msgspec
import pytest

from kvtier.errors import FingerprintError, GeometryError
from kvtier.geometry import Geometry, GroupGeometry
from kvtier.messages.calls import (
    Attach,
    CopiesEnded,
    Detach,
    Forget,
    Hint,
    ListConversations,
    Locate,
    Ping,
    Show,
)
from kvtier.messages.tiers import Announce, CancelCopies, Copied, DiskWritten, PoolJoined, PoolLeft, TierHello
from kvtier.node.events import Received
from kvtier.testing.core_rig import MODEL
from kvtier.testing.rig_uses import FULL, PLAIN, UNIT

MODES = pytest.mark.parametrize("mode", ["worker", "shared"])


def sent(rig, stimulus):
    """What the core answers, with the peers that it goes to."""
    return [(send.peer, send.message) for send in rig.handle(stimulus)]


# --- coming -----------------------------------------------------------------------------------------------


@MODES
def test_a_worker_is_told_its_name_and_the_gpu_service_of_it(rig, mode):
    message = Attach(fingerprint=MODEL, model="m", geometry=PLAIN, shard="s0", layout="l", mode=mode)
    (peer, attached), (gpu, joined) = sent(rig, Received("client:77", message))
    assert (peer, attached.arena_bytes, attached.gpu_socket) == ("client:77", [64 * UNIT], "/gpu.sock")
    assert (gpu, type(joined), joined.worker) == (rig.gpu.peer, PoolJoined, attached.worker)


def test_a_gpu_service_that_comes_later_is_told_of_every_worker(make_rig):
    rig = make_rig(started=False)
    worker = rig.attach()
    out = sent(rig, Received("gpu:8", TierHello(pid=1, address="/gpu.sock")))
    assert [m.worker for _, m in out if isinstance(m, PoolJoined)] == [worker.name]


GROUPS = {
    "no group": (),
    "no layer": (GroupGeometry("full", 0), GroupGeometry("state", 0)),
    "no window": (GroupGeometry("sliding", 8),),
    "a window of one": (GroupGeometry("sliding", 8, window_tokens=1),),
    "negative": (GroupGeometry("full", -8),),
    "a snapshot without bytes": (GroupGeometry("state", token_bytes=8),),
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_a_pool_without_a_usable_geometry_is_refused(rig, groups):
    attach = Attach(fingerprint=MODEL, model="m", geometry=Geometry(4, 2, groups), shard="s", layout="l")
    assert rig.ask(attach).error == GeometryError.__name__
    assert not rig.core.state.workers


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"fingerprint": b""}, FingerprintError),
        ({"fingerprint": b"short"}, FingerprintError),
        ({"shard": ""}, GeometryError),
        ({"geometry": Geometry(4, 3, (FULL,))}, GeometryError),
        ({"geometry": Geometry(0, 2, (FULL,))}, GeometryError),
        ({"geometry": Geometry(4, 0, (FULL,))}, GeometryError),
    ],
)
def test_an_attach_with_garbage_is_refused(rig, wrong, error):
    good = {"fingerprint": MODEL, "model": "m", "geometry": PLAIN, "shard": "s0", "layout": "l"}
    assert rig.ask(Attach(**(good | wrong))).error == error.__name__


def test_two_workers_of_one_model_and_shard_have_one_geometry(rig, worker):
    other = Geometry(4, 2, (GroupGeometry("full", UNIT),))
    good = {"fingerprint": MODEL, "model": "m", "layout": "l"}
    assert rig.ask(Attach(**good, geometry=other, shard="s0")).error == "GeometryError"
    assert rig.ask(Attach(**good, geometry=other, shard="s1")).worker


# --- roles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        TierHello(pid=1),
        Copied(job="p1.1", batch=0, ok=True),
        Announce(last=True),
        DiskWritten(job="w1.1", ok=True),
        PoolLeft(worker="worker:1"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_client_cannot_speak_for_a_service(rig, message):
    before = (rig.core.state.gpu_peer, rig.core.state.disk.peer)
    assert rig.ask(message, "client:3").error == "ProtocolError"
    assert (rig.core.state.gpu_peer, rig.core.state.disk.peer) == before


def test_a_worker_cannot_speak_for_another_one(rig, worker):
    twin = rig.attach()
    park = rig.park(worker, "chat", range(4))
    assert rig.ask(Detach(worker=worker.name), twin.peer).error == "ProtocolError"
    rig.ask(CopiesEnded(worker=twin.name, jobs=[park.job]), twin.peer)
    rig.run()
    assert park.receipt.level == "host"


# --- workers go -------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("word", [True, False])
def test_a_worker_dies_during_a_park(rig, mode, word):
    worker = rig.attach(mode=mode)
    park = rig.park(worker, "chat", range(16))
    rig.finish(rig.copies()[0])
    rig.kill(worker.proc, socket_first=word)
    assert (park.receipt.level, park.receipt.reason) == ("none", "cancelled")
    if mode == "shared":
        assert rig.host.usage().limbo_bytes > 0
        rig.run()
    assert rig.host.usage().limbo_bytes == 0
    assert rig.core.state.workers == {}


@MODES
def test_a_worker_dies_during_a_restore_and_what_it_parked_stays(rig, mode):
    worker = rig.attach(mode=mode)
    rig.park(worker, "chat", range(16))
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(16)), range(16))
    rig.finish(rig.copies()[0])
    rig.kill(worker.proc)
    assert (restore.receipt.tokens, restore.receipt.reason) == (0, "cancelled")
    rig.run()
    assert rig.resume(rig.attach(), "chat", range(16)).receipt.tokens == 16


def test_a_closed_socket_frees_nothing_until_the_process_ends(rig, worker):
    rig.park(worker, "chat", range(8))
    for op in rig.copies():
        rig.begin(op)
    rig.disconnect(worker.proc)
    limbo = rig.host.usage().limbo_bytes
    assert limbo == 4 * UNIT
    rig.tick(500.0)
    assert rig.host.usage().limbo_bytes == limbo
    rig.kill(worker.proc)
    assert rig.host.usage().limbo_bytes == 0


def test_a_worker_that_detaches_says_that_it_is_quiet(rig, worker):
    park = rig.park(worker, "chat", range(8))
    rig.ops.clear()
    assert type(rig.ask(Detach(worker=worker.name), worker.peer)).__name__ == "Done"
    assert park.receipt.reason == "cancelled"
    assert rig.host.usage().used_bytes == 0
    assert rig.park(worker, "chat", range(8)).failed.error == "ProtocolError"


def test_a_shared_pools_worker_cannot_say_that_the_service_is_quiet(rig):
    worker = rig.attach(mode="shared")
    rig.park(worker, "chat", range(8))
    for op in rig.copies():
        rig.begin(op)
    rig.ask(Detach(worker=worker.name), worker.peer)
    assert rig.host.usage().limbo_bytes == 4 * UNIT
    rig.run()
    assert rig.host.usage().limbo_bytes == 0


def test_plans_of_a_worker_that_left_hold_nothing(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    rig.plan(worker, "chat", range(8))
    rig.disconnect(worker.proc)
    assert rig.core._plans._held == {}
    assert not any(rig.host._book.held(e.slot.slot_id) for e in rig.host._entries.values())


# --- stopped and going on ---------------------------------------------------------------------------------


@MODES
def test_a_park_that_is_stopped_past_its_lease_ends_and_its_late_copies_are_refused(rig, mode):
    worker = rig.attach(mode=mode)
    park = rig.park(worker, "chat", range(8))
    for op in rig.copies():
        rig.begin(op)
    rig.tick(rig.settings.copy_lease_s + 0.1)
    assert (park.receipt.level, park.receipt.reason) == ("none", "lease_expired")
    assert not park.released
    assert rig.host.usage().limbo_bytes == 4 * UNIT
    other = rig.park(rig.attach(), "other", range(50, 90))
    for op in [op for op in rig.copies() if op.message.job == other.job]:
        rig.finish(op)
    assert not park.released
    rig.run()
    assert park.released
    assert len(park.receipts) == 1
    assert rig.host.usage().limbo_bytes == 0
    assert rig.resume(worker, "chat", range(8)).receipt.tokens == 0
    assert rig.resume(worker, "other", range(50, 90)).receipt.tokens == 40


@MODES
def test_a_restore_that_is_stopped_past_its_lease_ends_and_its_late_copies_do_not_count(rig, mode):
    worker = rig.attach(mode=mode)
    rig.park(worker, "chat", range(8))
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(8)), range(8), deadline_s=5.0)
    for op in rig.copies():
        rig.begin(op)
    rig.tick(30.0)
    assert restore.receipt.tokens == 0
    assert bool(restore.receipt.busy) == (mode == "shared")
    rig.run()
    assert len(restore.receipts) == 1
    assert rig.host.usage().limbo_bytes == 0


def test_a_room_that_may_still_be_written_to_is_nobody_elses(make_rig):
    rig = make_rig(arena_bytes=[4 * UNIT], disk=None)
    worker = rig.attach()
    rig.park(worker, "chat", range(8))
    for op in rig.copies():
        rig.begin(op)
    rig.tick(11.0)
    refused = rig.park(rig.attach(), "other", range(50, 54))
    rig.tick(31.0)
    assert refused.receipt.reason == "backpressure"
    rig.run()
    accepted = rig.park(worker, "other", range(50, 54))
    rig.run()
    assert accepted.receipt.level == "host"


def test_the_names_of_slots_are_never_used_again(make_rig):
    rig = make_rig(arena_bytes=[4 * UNIT], disk=None)
    worker = rig.attach()
    seen = set()
    for turn in range(6):
        rig.park(worker, "chat", range(100 * turn, 100 * turn + 8))
        names = {(item.slot_id, item.generation) for op in rig.copies() for item in op.items()}
        assert len(names) == 2
        assert names.isdisjoint(seen)
        seen |= names
        rig.run()


# --- the GPU service --------------------------------------------------------------------------------------


def test_the_gpu_service_dies_in_mode_worker_and_the_worker_proves_that_it_is_quiet(rig, worker):
    park = rig.park(worker, "chat", range(16))
    running, queued = rig.copies()
    rig.begin(running)
    rig.kill(rig.gpu)
    assert (park.receipt.level, park.receipt.reason, park.receipt.released) == ("none", "copy_failed", False)
    assert queued.cancelled
    rig.finish(queued)
    assert rig.host.usage().limbo_bytes > 0
    rig.finish(running)
    assert rig.host.usage().limbo_bytes == 0
    assert park.released
    rig.start_gpu()
    assert rig.park(worker, "chat", range(16)).job
    rig.run()
    assert rig.resume(worker, "chat", range(16)).receipt.tokens == 16


def test_the_gpu_service_dies_in_mode_shared_and_its_copies_with_it(rig):
    worker = rig.attach(mode="shared")
    park = rig.park(worker, "chat", range(16))
    rig.begin(rig.copies()[0])
    rig.kill(rig.gpu)
    assert park.receipt.reason == "copy_failed"
    assert park.released
    assert rig.host.usage().used_bytes == 0


def test_a_gpu_service_that_connects_again_has_ended_what_it_did(rig):
    worker = rig.attach(mode="shared")
    park = rig.park(worker, "chat", range(16))
    service = rig.gpu
    rig.begin(rig.copies()[0])
    rig.disconnect(service)
    assert rig.host.usage().limbo_bytes > 0
    assert not park.released
    for op in rig.copies():
        rig.finish(op)
    rig.start_gpu(pid=service.pid)
    assert park.released
    assert rig.host.usage().used_bytes == 0


def test_a_restore_without_a_gpu_service_ends_at_once(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    planned = rig.plan(worker, "chat", range(8))
    rig.kill(rig.gpu)
    assert rig.restore(worker, planned, range(8)).receipt.reason == "copy_failed"
    assert any("GPU service" in warning for warning in rig.core.status().warnings)
    assert not rig.core.status().ready


def test_a_park_that_fails_cancels_what_has_not_begun(rig, worker):
    rig.park(worker, "chat", range(16))
    first = rig.copies()[0]
    stimulus = Received(
        rig.gpu.peer, Copied(job=first.message.job, batch=0, ok=False, failed=[(0, "error: x")])
    )
    assert [type(m) for _, m in sent(rig, stimulus)] == [CancelCopies]
    rig.ops.remove(first)


def test_an_answer_that_nobody_waits_for_is_ignored(rig, worker):
    assert sent(rig, Received(rig.gpu.peer, Copied(job="p9.9", batch=0, ok=True))) == []
    assert sent(rig, Received(rig.disk.peer, DiskWritten(job="w9.9", ok=True))) == []


def test_questions_do_not_move_anything(rig, worker):
    rig.park(worker, "chat", range(8))
    before = len(rig.ops)
    rig.ask(Ping())
    rig.ask(Hint(conversation="chat", tenant="acme"))
    assert len(rig.ops) == before


# --- what callers may ask for -----------------------------------------------------------------------------

LONG = "x" * 1025


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Show(conversation=LONG, tenant="acme"), "conversation"),
        (Show(conversation="chat", tenant=LONG), "tenant"),
        (Show(conversation="", tenant="acme"), "conversation"),
        (Locate(conversation="chat", tenant=LONG), "tenant"),
        (Hint(conversation="é" * 513, tenant="acme"), "conversation"),
        (Forget(conversation="chat", tenant=LONG), "tenant"),
        (ListConversations(tenant=LONG), "tenant"),
    ],
)
def test_names_have_a_bound_whoever_asks(make_rig, message, field):
    refusal = make_rig().ask(message)
    assert (refusal.error, refusal.message.partition(":")[0]) == ("ConfigError", field)
    assert refusal.fix


@pytest.mark.parametrize("field", ["tenant", "conversation", "fidelity", "codec"])
def test_a_park_with_a_long_name_changes_nothing_and_reaches_no_disk(make_rig, field):
    rig = make_rig()
    worker = rig.attach()
    names = {"name": "chat"} | {"name" if field == "conversation" else field: LONG}
    park = rig.park(worker, **names, tokens=range(8), level="disk")
    assert (park.failed.error, field in park.failed.message) == ("ConfigError", True)
    assert not rig.ops and not rig.core.state.conversations
    plan = rig.plan(worker, "chat", range(8), tenant=LONG)
    assert plan.error == "ConfigError"


@pytest.mark.parametrize("field", ["shard", "model", "layout"])
def test_a_pool_with_a_long_name_is_not_attached(make_rig, field):
    rig = make_rig()
    attach = Attach(fingerprint=b"m" * 32, model="m", geometry=PLAIN, shard="s", layout="l", pool_pages=4)
    refusal = rig.ask(msgspec.structs.replace(attach, **{field: LONG}), "client:1")
    assert (refusal.error, field in refusal.message) == ("ConfigError", True)
    assert not rig.core.state.workers
