"""What the disk holds is taken over in parts, and a damaged record costs one conversation and no more."""

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier import records
from kvtier.errors import CorruptObject
from kvtier.messages.calls import Forget, Status
from kvtier.node import adoption, wire
from kvtier.node import state as state_module
from kvtier.node.conversations import Conversation, Head, from_bytes
from kvtier.node.state import NodeState
from kvtier.records import frame
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.node_machine import NodeMachine

BYTES32 = st.binary(min_size=32, max_size=32)
SECONDS = st.none() | st.floats(allow_nan=False)
HEADS = st.builds(
    Head,
    BYTES32,
    st.integers(0, 2**40),
    BYTES32,
    BYTES32,
    st.none() | st.tuples(st.integers(0, 2**40), st.binary(max_size=16)),
    st.floats(allow_nan=False),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONVERSATIONS = st.builds(
    Conversation,
    TEXT,
    TEXT,
    st.integers(0, 2**62),
    st.lists(HEADS, max_size=3),
    returns_at_s=SECONDS,
    keep_until_s=SECONDS,
    codec=TEXT,
)


def flip(data, bit):
    return bytes(b ^ (1 << bit % 8) if at == bit // 8 else b for at, b in enumerate(data))


def said(known):
    return (known.id, known.version, known.ends, known.returns_at_s, known.keep_until_s, known.codec)


# --- the record -----------------------------------------------------------------------------------------


@given(CONVERSATIONS)
def test_a_record_comes_back_as_it_was(known):
    assert said(from_bytes(*known.id, known.version, known.to_bytes())) == said(known)


@given(CONVERSATIONS, st.data())
def test_any_flipped_bit_of_a_record_is_seen(known, data):
    packed = known.to_bytes()
    bit = data.draw(st.integers(0, 8 * len(packed) - 1))
    with pytest.raises(CorruptObject):
        from_bytes(*known.id, known.version, flip(packed, bit))


@given(CONVERSATIONS, st.integers(1, 3))
def test_a_record_under_another_name_or_version_is_seen(known, other):
    for name in [
        (known.tenant + "x", known.name, known.version),
        (known.tenant, known.name + "x", known.version),
        (*known.id, known.version + other),
    ]:
        with pytest.raises(CorruptObject):
            from_bytes(*name, known.to_bytes())


@given(st.binary(max_size=200), st.booleans())
@example(b"\x80", True)
@example(b"\xc1", True)
@example(b"\x91" * 100_000, True)
@example(b"\x81\xa1\xff\x91", True)
@example(b"", False)
def test_any_bytes_are_a_record_or_damaged(data, framed):
    """Also where the sum fits: nothing but the one error, whatever a record was made of."""
    try:
        known = from_bytes("t", "c", 1, frame("t", "c", 1, data) if framed else data)
    except CorruptObject:
        return
    assert isinstance(known, Conversation)


def test_a_sum_that_is_not_looked_at_would_name_another_chain(monkeypatch):
    """The control: without its sum a record with a flipped bit names blocks that never were."""
    head = Head(b"k" * 32, 4, b"r" * 32, b"f" * 32, None, 1.0)
    known = Conversation("acme", "chat", 1, [head])
    packed = known.to_bytes()
    bit = 8 * packed.index(b"k" * 32)
    with pytest.raises(CorruptObject):
        from_bytes("acme", "chat", 1, flip(packed, bit))
    monkeypatch.setattr(records, "_sum", lambda *parts: packed[1:9])
    assert from_bytes("acme", "chat", 1, flip(packed, bit)).heads[0].key != head.key


# --- adopting it ----------------------------------------------------------------------------------------


def spoil(rig, name, bit=100):
    """One bit of a record on disk is another."""
    record = rig.store.records["acme", name]
    rig.store.records["acme", name] = msgspec.structs.replace(record, data=flip(record.data, bit))


@pytest.fixture
def parked():
    """Three conversations on disk, nothing of which the others name."""
    rig = CoreRig()
    worker = rig.attach()
    for n, name in enumerate(["a", "b", "c"]):
        rig.park(worker, name, range(100 * n, 100 * n + 10), level="disk")
    rig.run()
    return rig


@pytest.mark.parametrize("bit", [0, 20, 100, 300])
def test_a_flipped_record_costs_its_conversation_and_no_more(parked, bit):
    spoil(parked, "b", bit)
    reborn = parked.restarted()
    report = reborn.ask(Status()).report
    assert report.ready
    assert report.counters["damaged_records"] == 1
    assert any("1 damaged records" in warning for warning in report.warnings)
    reborn.run()
    worker = reborn.attach()
    assert reborn.resume(worker, "a", range(12)).receipt.tokens == 10
    assert reborn.resume(worker, "c", range(200, 212)).receipt.tokens == 10
    assert set(reborn.store.records) == {("acme", "a"), ("acme", "c")}, "it has healed"
    healed = reborn.restarted().ask(Status()).report
    assert (healed.ready, healed.counters["damaged_records"]) == (True, 0)
    reborn.park(worker, "b", range(100, 110), level="disk")
    reborn.run()
    assert reborn.restarted().ask(Status()).report.conversations == 3
    assert not reborn.violations


def test_a_flipped_record_of_a_conversation_that_lives_is_written_anew(parked):
    """Its disk service alone was started again."""
    spoil(parked, "b")
    parked.kill(parked.disk)
    parked.start_disk()
    parked.run()
    assert parked.ask(Status()).report.counters["damaged_records"] == 1
    reborn = parked.restarted()
    assert reborn.ask(Status()).report.counters["damaged_records"] == 0
    assert reborn.resume(reborn.attach(), "b", range(100, 112)).receipt.tokens == 10


# --- in parts -------------------------------------------------------------------------------------------


@pytest.fixture
def one_at_a_time(monkeypatch):
    monkeypatch.setattr(adoption, "UNITS_AT_ONCE", 1)


def adopt(rig):
    """Ticks until the store is taken over; answers how many it took."""
    ticks = 0
    while rig.core.has_more():
        ticks += 1
        rig.tick()
    return ticks


@pytest.mark.parametrize(("units", "in_one"), [(2, 2), (10**9, 9)])
def test_no_part_is_larger_than_it_may_be(parked, monkeypatch, units, in_one):
    """The last one is the control: without the bound all is one part."""
    monkeypatch.setattr(adoption, "UNITS_AT_ONCE", units)
    taken = []
    stored_on_disk, handle = NodeState.stored_on_disk, CoreRig.handle

    def counted(state, meta):
        taken[-1] += 1
        return stored_on_disk(state, meta)

    def handled(rig, stimulus):
        taken.append(0)
        return handle(rig, stimulus)

    monkeypatch.setattr(NodeState, "stored_on_disk", counted)
    monkeypatch.setattr(CoreRig, "handle", handled)
    reborn = parked.restarted()
    adopt(reborn)
    assert (max(taken), sum(taken)) == (in_one, len(parked.store.objects))


def test_a_large_store_is_adopted_in_parts_between_which_the_node_answers(parked, one_at_a_time):
    reborn = parked.restarted()
    assert not reborn.ask(Status()).report.ready
    blocks = len(parked.core.state.tree)
    assert adopt(reborn) > 2 * blocks, "a part for each object, for each chain, and for each check"
    report = reborn.ask(Status()).report
    assert (report.ready, report.conversations) == (True, 3)
    assert reborn.resume(reborn.attach(), "a", range(12)).receipt.tokens == 10


@pytest.mark.parametrize("ticks", range(0, 30, 3))
def test_what_is_parked_and_forgotten_between_the_parts_counts(parked, one_at_a_time, ticks):
    reborn = parked.restarted()
    for _ in range(ticks):
        reborn.tick()
    worker = reborn.attach()
    park = reborn.park(worker, "a", range(14))
    reborn.ask(Forget(conversation="b", tenant="acme"))
    reborn.run()
    assert park.receipt.level == "host"
    adopt(reborn)
    reborn.run()
    assert reborn.resume(worker, "a", range(16)).receipt.tokens == 14
    assert reborn.resume(worker, "c", range(200, 212)).receipt.tokens == 10
    state = reborn.core.state
    assert all(block.names for block in state.tree)
    kept = {wire.key_of(s.on_disk.object_id) for b in state.tree for s in b.parts.values() if s.on_disk}
    assert set(reborn.store.objects) == kept
    assert ("acme", "b") not in reborn.store.records
    assert not reborn.violations


def test_a_disk_service_that_goes_away_in_the_middle_begins_again(parked, one_at_a_time):
    reborn = parked.restarted()
    for _ in range(8):
        reborn.tick()
    assert reborn.core.has_more()
    reborn.kill(reborn.disk)
    reborn.tick()
    assert not reborn.core.has_more()
    reborn.start_disk()
    adopt(reborn)
    assert reborn.ask(Status()).report.ready
    assert reborn.resume(reborn.attach(), "b", range(100, 112)).receipt.tokens == 10


def test_anything_in_any_order_while_the_store_is_adopted_in_parts(one_at_a_time, monkeypatch):
    run, restarted = CoreRig.run, CoreRig.restarted

    def run_all(rig):
        adopt(rig)
        run(rig)

    def restarted_whole(rig, **how):
        reborn = restarted(rig, **how)
        adopt(reborn)
        return reborn

    monkeypatch.setattr(CoreRig, "run", run_all)
    monkeypatch.setattr(CoreRig, "restarted", restarted_whole)
    run_state_machine_as_test(
        NodeMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- what lookups leave behind --------------------------------------------------------------------------


def test_a_lookup_by_a_new_tenant_leaves_no_more_than_a_bounded_number_of_roots(parked, monkeypatch):
    monkeypatch.setattr(state_module, "_ROOTS_MOST", 8)
    state, worker = parked.core.state, parked.attach()
    first = state.root("acme", worker.fingerprint, "exact", 4)
    for n in range(50):
        parked.plan(worker, "nothing", range(10), tenant=f"tenant{n}")
    assert len(state._roots) == 8
    assert state.root("acme", worker.fingerprint, "exact", 4) == first
