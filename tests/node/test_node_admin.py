"""Forgetting, hints, and what people ask about."""

import pytest

from kvtier.messages.calls import (
    Forget,
    Forgotten,
    Hint,
    ListConversations,
    ListModels,
    Locate,
    Ping,
    Show,
    Status,
)
from kvtier.messages.tiers import DiskRemove
from kvtier.node.events import ArenaGrew
from kvtier.testing.rig_uses import UNIT


def forget(rig, name="chat", tenant="acme"):
    answer = rig.ask(Forget(conversation=name, tenant=tenant))
    return None if answer is None else answer.receipt


def found(rig, worker, tokens, name=""):
    planned = rig.plan(worker, name, tokens, lease_s=0.0)
    rig.tick()
    return planned.plan.load_tokens


def late_receipt(rig):
    return [a.receipt for answers in rig.answers.values() for a in answers if isinstance(a, Forgotten)][-1]


# --- forget -----------------------------------------------------------------------------------------------


def test_a_forgotten_conversation_is_nowhere(rig, worker):
    rig.park(worker, "chat", range(10))
    rig.run()
    receipt = forget(rig)
    assert (receipt.found, receipt.durable, receipt.erased_objects) == (True, True, 3)
    assert receipt.erased_bytes == 10 * UNIT // 2
    assert found(rig, worker, range(10)) == 0
    assert rig.host.usage().used_bytes == 0
    assert not forget(rig).found


def test_what_others_name_too_is_kept(rig, worker):
    for name, tokens in (("chat", range(10)), ("other", [*range(8), 90])):
        rig.park(worker, name, tokens)
        rig.run()
    receipt = forget(rig)
    assert (receipt.erased_objects, receipt.kept_shared_objects) == (1, 2)
    assert receipt.kept_shared_bytes == 4 * UNIT
    assert found(rig, worker, range(10)) == 8
    assert forget(rig, "other").erased_objects == 3
    assert rig.host.usage().used_bytes == 0


def test_every_branch_is_forgotten_also_those_above_the_limit(rig, worker):
    for branch in range(20):
        rig.park(worker, "chat", [*range(4), 100 + branch])
        rig.run()
    assert forget(rig).erased_objects == 21
    assert rig.host.usage().used_bytes == 0


def test_the_answer_comes_when_the_disk_has_removed_it(rig, worker):
    rig.park(worker, "chat", range(10), level="disk")
    rig.run()
    assert forget(rig) is None
    (op,) = rig.disk_ops()
    assert isinstance(op.message, DiskRemove)
    assert (op.message.durable, len(op.message.object_keys), len(op.message.records)) == (True, 3, 1)
    assert found(rig, worker, range(10)) == 0
    rig.run()
    assert late_receipt(rig).erased_objects == 3
    assert not rig.store.objects
    assert not rig.store.records


def test_a_disk_that_cannot_remove_makes_the_receipt_say_so(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run()
    forget(rig)
    rig.finish(rig.disk_ops()[0], "it does not")
    receipt = late_receipt(rig)
    assert (receipt.durable, receipt.reason, receipt.detail) == (False, "disk_error", "it does not")


def test_a_running_park_is_cancelled_and_leaves_nothing(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    park = rig.park(worker, "chat", range(16), level="disk")
    rig.finish(rig.copies()[0])
    forget(rig)
    assert (park.receipt.level, park.receipt.reason) == ("none", "forgotten")
    rig.run()
    assert rig.host.usage().used_bytes == 0
    assert not rig.store.objects
    assert not rig.store.records


def test_what_is_being_written_is_removed_when_the_write_has_ended(rig, worker):
    park = rig.park(worker, "chat", range(8), level="disk")
    rig.run_copies()
    writes = rig.disk_ops()
    forget(rig)
    assert park.receipt.reason == "forgotten"
    assert rig.disk_ops() == writes, "the removal must not overtake the writes"
    rig.run()
    assert not rig.store.objects
    assert late_receipt(rig).durable


def test_a_record_that_is_being_written_is_removed_when_the_write_has_ended(rig, worker):
    rig.park(worker, "chat", range(4), level="disk")
    rig.run_copies()
    rig.finish(rig.disk_ops()[0])
    forget(rig)
    rig.run()
    assert not rig.store.records
    assert not rig.store.objects


def test_a_restore_in_progress_ends_and_leaves_nothing(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(8)), range(8))
    for op in rig.copies():
        rig.begin(op)
    assert forget(rig).durable
    assert rig.host.usage().objects == 0
    assert rig.host.usage().limbo_bytes == 4 * UNIT
    rig.run()
    assert restore.receipts
    assert rig.host.usage().used_bytes == 0


def test_what_is_being_read_is_not_put_back_into_memory(make_rig):
    rig = make_rig()
    rig.park(rig.attach(), "chat", range(8), level="disk")
    rig.run()
    rig = make_rig(disk=rig.store, epoch=2)
    worker = rig.attach()
    restore = rig.restore(worker, rig.plan(worker, "chat", range(8)), range(8))
    reads, kept = list(rig.ops), dict(rig.store.objects)
    forget(rig)
    # The reads had begun before the removal.
    rig.store.objects.update(kept)
    for read in reads:
        rig.finish(read)
    for key in kept:
        del rig.store.objects[key]
    assert restore.receipt.reason == "incomplete"
    rig.run()
    assert rig.host.usage().used_bytes == 0
    assert found(rig, worker, range(8)) == 0


def test_a_park_of_the_same_tokens_by_another_conversation_goes_on(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    twin = rig.attach()
    other = rig.park(twin, "other", range(16))
    forget(rig)
    rig.run()
    rig.tick()
    rig.run()
    assert other.receipt.level == "host"
    assert rig.resume(twin, "other", range(16)).receipt.tokens == 16


def test_while_the_disk_is_away_forgetting_is_not_durable_but_comes_true(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    rig.kill(rig.disk)
    receipt = forget(rig)
    assert (receipt.found, receipt.durable) == (True, False)
    assert rig.store.objects
    rig.start_disk()
    rig.run()
    assert not rig.store.objects
    assert not rig.store.records
    assert found(rig, worker, range(8)) == 0


def test_without_any_disk_forgetting_is_durable(make_rig):
    rig = make_rig(disk=None)
    rig.park(rig.attach(), "chat", range(8))
    rig.run()
    assert forget(rig).durable


def test_the_disk_dies_before_it_answers_and_the_removal_is_made_up_for(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    kept = (dict(rig.store.objects), dict(rig.store.records))
    forget(rig)
    rig.store.objects, rig.store.records = kept
    rig.kill(rig.disk)
    assert not late_receipt(rig).durable
    rig.start_disk()
    rig.run()
    assert not rig.store.objects
    assert not rig.store.records


def test_what_nobody_names_is_not_kept_over_a_restart(rig, worker):
    rig.park(worker, "chat", range(16), level="disk")
    rig.finish(rig.copies()[0])
    rig.run_disk()
    assert rig.store.objects
    reborn = rig.restarted()
    reborn.run()
    assert not reborn.store.objects


def test_objects_of_a_park_that_failed_are_forgotten_too(rig, worker):
    rig.park(worker, "chat", range(16))
    first, second = rig.copies()
    rig.finish(first)
    rig.finish(second, "error: of the device")
    rig.run()
    assert rig.host.usage().used_bytes > 0
    assert forget(rig).found
    assert rig.host.usage().used_bytes == 0


def test_a_name_that_was_forgotten_can_be_used_again(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    forget(rig)
    again = rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    assert again.receipt.level == "disk"
    reborn = rig.restarted()
    assert found(reborn, reborn.attach(), range(8), "chat") == 8


def test_tenants_have_names_of_their_own(rig, worker):
    for tenant in ("acme", "rival"):
        rig.park(worker, "chat", range(8), tenant=tenant)
        rig.run()
    assert forget(rig, tenant="rival").erased_objects == 2
    assert found(rig, worker, range(8)) == 8


def test_the_receipt_says_what_went_and_what_stayed_in_each_tier(make_rig):
    rig = make_rig(arena_bytes=[8 * UNIT])
    worker = rig.attach()
    rig.park(worker, "chat", range(16), level="disk")
    rig.run()
    rig.park(worker, "other", [*range(8), *range(60, 64)], level="disk")
    rig.run()
    rig.park(worker, "last", range(70, 74))
    rig.run()
    # Of the 4 blocks of 'chat' the first 2 are those of 'other' too; host memory holds 4 blocks of all.
    in_host = {meta.object_id.block_key for meta in rig.host.objects()}
    chain = rig.core.state.tree.chain(rig.core.state.conversations["acme", "chat"].heads[-1].key)
    there = [block.key in in_host for block in chain]
    assert False in there
    receipt = forget(rig)
    rig.run()
    receipt = receipt or late_receipt(rig)
    block = 2 * UNIT
    assert (receipt.erased_objects, receipt.kept_shared_objects) == (2, 2)
    assert (receipt.erased_bytes, receipt.kept_shared_bytes) == (2 * block, 2 * block)
    assert (receipt.erased_disk_bytes, receipt.kept_shared_disk_bytes) == (2 * block, 2 * block)
    assert receipt.erased_host_bytes == sum(there[2:]) * block
    assert receipt.kept_shared_host_bytes == sum(there[:2]) * block
    assert receipt.durable


def test_whoever_asks_again_hears_when_it_is_durable(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    rig.kill(rig.disk)
    first = forget(rig)
    assert (first.found, first.durable, first.erased_objects, first.erased_disk_bytes) == (True, False, 2, 0)
    again = forget(rig)
    assert (again.found, again.durable) == (True, False)
    rig.start_disk()
    rig.run()
    assert forget(rig).durable
    rig.run()
    assert not (rig.store.objects or rig.store.records)


# --- hint, locate -----------------------------------------------------------------------------------------


def test_a_hint_is_kept_over_a_restart(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    assert type(rig.ask(Hint(conversation="chat", tenant="acme", returns_in_s=5.0))).__name__ == "Done"
    rig.ask(Hint(conversation="chat", tenant="acme", keep_for_s=50.0))
    rig.tick()
    rig.run()
    (known,) = rig.restarted().core.state.conversations.values()
    assert (known.returns_at_s, known.keep_until_s, known.version) == (1005.0, 1050.0, 3)


def test_a_hint_about_nobody_is_no_error(rig):
    assert type(rig.ask(Hint(conversation="who", tenant="acme"))).__name__ == "Done"


def test_locate_says_what_this_node_has_of_a_conversation(rig, worker):
    assert rig.ask(Locate(conversation="chat", tenant="acme")).nodes == []
    rig.park(worker, "chat", range(10))
    rig.run()
    ((node, tokens, eta_s),) = rig.ask(Locate(conversation="chat", tenant="acme")).nodes
    assert (node, tokens) == ("local", 10)
    assert 0 < eta_s < 1


# --- lists ------------------------------------------------------------------------------------------------


def test_conversations_are_listed_page_by_page(rig, worker):
    for tenant, name in (("b", "1"), ("a", "2"), ("a", "1")):
        rig.park(worker, name, range(4), tenant=tenant)
        rig.run()
    pages, after = [], None
    while True:
        answer = rig.ask(ListConversations(after=after, limit=2))
        pages.append([(c.tenant, c.conversation) for c in answer.conversations])
        if not answer.more:
            break
        after = pages[-1][-1]
    assert pages == [[("a", "1"), ("a", "2")], [("b", "1")]]
    assert len(rig.ask(ListConversations(tenant="a")).conversations) == 2
    assert len(rig.ask(ListConversations(limit=-5)).conversations) == 1


@pytest.mark.parametrize("level", ["host", "disk"])
def test_show_tells_where_a_conversation_lies(rig, worker, level):
    rig.park(worker, "chat", range(10), level=level)
    rig.run()
    (info,) = rig.ask(Show(conversation="chat", tenant="acme")).conversations
    assert (info.tokens, info.branches, info.model, info.share) == (10, 1, "model", "prefix")
    assert (info.host_tokens, info.disk_tokens) == (10, 10 if level == "disk" else 0)
    assert (info.bytes, info.parked_at_s, info.version) == (10 * UNIT // 2, 1000.0, 1)
    assert rig.ask(Show(conversation="who", tenant="acme")).conversations == []


def test_models_are_listed_with_their_bytes(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    rig.attach(fingerprint=b"n" * 32)
    first, second = rig.ask(ListModels()).models
    assert (first.conversations, first.objects, first.workers) == (1, 2, 1)
    assert (first.host_bytes, first.disk_bytes) == (4 * UNIT, 4 * UNIT)
    assert (second.objects, second.workers) == (0, 1)


def test_names_of_models_survive_a_restart(rig, worker):
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()
    assert rig.restarted().ask(ListModels()).models[0].model == "model"


def test_status_counts(rig, worker):
    rig.park(worker, "chat", range(8))
    rig.run()
    rig.resume(worker, "chat", range(10))
    rig.tick(2.0)
    report = rig.ask(Status()).report
    assert (report.ready, report.node, report.epoch, report.uptime_s) == (True, "local", 1, 2.0)
    assert [tier.state for tier in report.tiers] == ["ready", "ready", "ready"]
    assert (report.conversations, report.waiting_parks, len(report.workers)) == (1, 0, 1)
    counters = report.counters
    assert (counters["parks.host"], counters["restores.host"], counters["restored_tokens"]) == (1, 1, 8)
    assert counters["restored_bytes"] == counters["parked_bytes"] == 4 * UNIT


def test_a_node_without_the_disk_that_it_should_have_is_not_ready(rig):
    rig.kill(rig.disk)
    report = rig.ask(Status()).report
    assert not report.ready
    assert [tier.state for tier in report.tiers] == ["ready", "ready", "absent"]


def test_uptime_counts_from_the_first_stimulus_also_at_time_zero(make_rig):
    rig = make_rig(started=False)
    fresh = type(rig.core)(
        rig.settings, rig.host, rig.core.state.policies, b"s" * 32, rig.core.state.rng,
        epoch=1, arena_bytes=[UNIT], generation_slots=1,
    )  # fmt: skip
    fresh.handle(0.0, ArenaGrew(0, 64 * UNIT))
    fresh.handle(7.0, ArenaGrew(0, 64 * UNIT))
    assert fresh.status().uptime_s == 7.0


def test_the_empty_call_is_answered(rig):
    assert type(rig.ask(Ping())).__name__ == "Pong"
