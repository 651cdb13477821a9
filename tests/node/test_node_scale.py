"""What a node's work costs in steps, with few and with many conversations: no walk over what others have."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from kvtier.messages.calls import Explain, Forget, ListModels, Message
from kvtier.messages.cluster import SERVICE, Drain
from kvtier.messages.tiers import DiskWrite
from kvtier.node import explain as explain_module
from kvtier.node import room as room_module
from kvtier.node.events import Received
from kvtier.node.park_job import ParkJob
from kvtier.node.parks import Parks
from kvtier.node.settings import NodeSettings
from kvtier.policy.lru import LeafLru
from kvtier.policy.usage import Account, TierName
from kvtier.policy.worth_runs import Book, Run
from kvtier.policy.worth_usage import CostUsage
from kvtier.receipts import Level
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import drain, problems
from kvtier.testing.rig_uses import UNIT, RigPark, RigWorker

BLOCK, CHAIN = 2 * UNIT, 4


class Counting(dict):  # type: ignore[type-arg]
    """A tree's blocks, and how many of them were looked at."""

    looked_at = 0

    def get(self, key, default=None):  # type: ignore[no-untyped-def]
        self.looked_at += 1
        return super().get(key, default)

    def values(self):  # type: ignore[no-untyped-def]
        self.looked_at += len(self)
        return super().values()


def count_looks(rig: CoreRig) -> Counting:
    """From now on."""
    tree = rig.core.state.tree
    tree._blocks = counting = Counting(tree._blocks)
    return counting


def count_victims(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Everybody whom a policy names from now on as one to go."""
    seen: list[bytes] = []
    victims = LeafLru.victims

    def watched(self: LeafLru, now_s: float) -> Iterator[bytes]:
        for key in victims(self, now_s):
            seen.append(key)
            yield key

    monkeypatch.setattr(LeafLru, "victims", watched)
    return seen


def parked(rig: CoreRig, worker: RigWorker, number: int, level: Literal["host", "disk"] = "host") -> RigPark:
    """A conversation of CHAIN blocks that shares none."""
    first = 1000 * number
    park = rig.park(worker, f"chat-{number}", range(first, first + CHAIN * 4), level=level)
    rig.run()
    return park


def full(count: int, clean: int, eviction: str = "lru") -> tuple[CoreRig, RigWorker]:
    """Host memory full of `count` conversations; the last `clean` of them are also on disk."""
    settings = NodeSettings(batch_bytes=CHAIN * BLOCK, spill_batch_bytes=CHAIN * BLOCK)
    arena_bytes = [count * CHAIN * BLOCK]
    rig = CoreRig(arena_bytes=arena_bytes, disk=1 << 40, settings=settings, eviction=eviction)
    worker = rig.attach()
    for number in range(count):
        parked(rig, worker, number, "disk" if number >= count - clean else "host")
    assert rig.core.state.dirty_bytes == (count - clean) * CHAIN * BLOCK
    return rig, worker


# --- looking up -------------------------------------------------------------------------------------------


def test_a_lookup_keys_no_block_behind_the_first_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = CoreRig()
    worker = rig.attach()
    parked(rig, worker, 1)
    front, keyed = range(1000, 1000 + CHAIN * 4), []
    sha256 = hashlib.sha256

    def counted(data: bytes = b"") -> Any:
        keyed.append(data)
        return sha256(data)

    for rest in (1, 100):
        keyed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(hashlib, "sha256", counted)
            planned = rig.plan(worker, "chat-1", [*front, *range(10**6, 10**6 + 4 * rest)])
        assert planned is not None and planned.plan.load_tokens == CHAIN * 4
        assert len(keyed) == CHAIN + 1


# --- memory -----------------------------------------------------------------------------------------------


def cycles(rig: CoreRig) -> list[str]:
    """What of the project only the collector of cycles frees, after some of all that a node does."""
    worker = rig.attach()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for number in range(4):
            parked(rig, worker, number, ("host", "disk")[number % 2])
            rig.resume(worker, f"chat-{number}", range(1000 * number, 1000 * number + CHAIN * 4))
        rig.ask(Forget(conversation="chat-1", tenant="acme"))
        rig.run()
        gc.collect()
        return [str(type(one)) for one in gc.garbage if type(one).__module__.startswith("kvtier")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_nothing_waits_for_the_collector_of_cycles() -> None:
    """It goes through all that a node knows, and nothing else happens meanwhile."""
    assert cycles(CoreRig()) == []


def test_the_control_a_park_that_names_itself_does(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Parks._finish

    def knotted(self: Parks, job: ParkJob, level: Level) -> None:
        finish(self, job, level)
        job.pages = [job]  # type: ignore[list-item]

    monkeypatch.setattr(Parks, "_finish", knotted)
    assert str(ParkJob) in cycles(CoreRig())


# --- room -------------------------------------------------------------------------------------------------


def looks_for_room(count: int) -> int:
    rig, worker = full(count, clean=count // 8)
    counting = count_looks(rig)
    park = parked(rig, worker, count)
    looked_at = counting.looked_at
    assert park.receipt.level == "host"
    assert problems(rig) == []
    return looked_at


def test_a_park_into_memory_full_of_what_is_not_on_disk_passes_over_a_bounded_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room_module, "_PASS_OVER_BLOCKS", 16)
    few, many = looks_for_room(32), looks_for_room(128)
    assert few == many


def test_the_control_without_the_bound_it_grows_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "_PASS_OVER_BLOCKS", 1 << 30)
    assert looks_for_room(128) > 2 * looks_for_room(32)


def test_a_search_in_vain_is_not_repeated_until_a_write_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, worker = full(8, clean=0)
    parks = [rig.park(worker, f"new-{n}", range(9000 + 100 * n, 9016 + 100 * n)) for n in range(4)]
    assert any(isinstance(op.message, DiskWrite) for op in rig.disk_ops())
    seen = count_victims(monkeypatch)
    for _ in range(20):
        rig.tick()
    assert seen == []
    rig.run()
    assert seen and all(park.receipt.level == "host" for park in parks)


def test_after_a_while_it_is_repeated_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, worker = full(8, clean=0)
    rig.park(worker, "new", range(9000, 9016))
    seen = count_victims(monkeypatch)
    rig.tick(2 * room_module._SEARCH_AGAIN_S)
    assert seen


def test_what_a_plan_holds_does_not_hide_what_could_be_written() -> None:
    rig, worker = full(8, clean=0)
    for number in range(2):
        first = 1000 * number
        assert rig.plan(worker, f"chat-{number}", range(first, first + CHAIN * 4)).plan.plan_id
    # Used just now, so the last to go; have them be the first again.
    host = rig.core.state.policies.host
    for number in range(2, 8):
        for block in rig.core.state.tree.named(("acme", f"chat-{number}")):
            host.used(block.key, rig.now_s)
    park = parked(rig, worker, 99)
    assert park.receipt.level == "host"
    assert rig.core.state.counters.spilled_bytes > 0


# --- draining ---------------------------------------------------------------------------------------------


def drained(count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """Victims named, blocks looked at, and writes, until a node of so many conversations has drained."""
    rig, _ = full(count, clean=0)
    writes: list[DiskWrite] = []
    arrive = rig._at_disk

    def watched(peer: str, message: Message) -> None:
        if isinstance(message, DiskWrite):
            writes.append(message)
        arrive(peer, message)

    rig._at_disk = watched  # type: ignore[method-assign]
    counting = count_looks(rig)
    with monkeypatch.context() as patch:
        seen = count_victims(patch)
        rig.tell(Received(SERVICE, Drain()))
        while rig.core.state.dirty_bytes:
            rig.run()
            rig.tick(0.2)
    newest = rig.core.state.tree.named(("acme", f"chat-{count - 1}"))
    assert {meta.block_key for meta in writes[0].metas} == {block.key for block in newest}
    drain(rig)
    assert problems(rig) == []
    return len(seen), counting.looked_at, len(writes)


def test_draining_walks_the_order_once_whatever_the_number_of_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for count in (8, 32):
        victims, looked_at, writes = drained(count, monkeypatch)
        assert writes >= count
        assert victims == count
        assert looked_at < 40 * count * CHAIN


# --- questions and records --------------------------------------------------------------------------------


def test_models_are_told_without_a_look_at_any_block() -> None:
    rig, _ = full(8, clean=2)
    counting = count_looks(rig)
    (model,) = rig.ask(ListModels()).models
    assert counting.looked_at == 0
    assert (model.objects, model.host_bytes, model.disk_bytes) == (32, 32 * BLOCK, 8 * BLOCK)
    assert model.conversations == 8


def full_in_parts(count: int, eviction: str) -> tuple[CoreRig, RigWorker]:
    """Every other block of chat-7 has left host memory, and all is on disk."""
    rig, worker = full(count, clean=count, eviction=eviction)
    state = rig.core.state
    for block in state.tree.named(("acme", "chat-7"))[::2]:
        for stored in block.parts.values():
            state.remove_from_host(block, stored)
    return rig, worker


def test_explaining_orders_a_tier_once_for_all_parts_of_a_conversation() -> None:
    rig, worker = full_in_parts(8, "lru")
    state = rig.core.state
    walked: list[int] = []

    class Stamps(dict):  # type: ignore[type-arg]
        def items(self):  # type: ignore[no-untyped-def]
            walked.append(len(self))
            return super().items()

    for tier in (state.policies.host, state.policies.disk):
        assert isinstance(tier, LeafLru)
        tier._stamps = Stamps(tier._stamps)
    explanation = rig.ask(Explain(conversation="chat-7", tenant="acme")).explanation
    assert [run.tiers for run in explanation.runs] == [("disk",), ("host", "disk")] * 2
    assert len(walked) == 2
    # What comes afterwards counts.
    before = rig.ask(Explain(conversation="chat-7", tenant="acme")).explanation
    parked(rig, worker, 77)
    assert rig.ask(Explain(conversation="chat-7", tenant="acme")).explanation.runs != before.runs
    assert len(walked) > 2


def reckoned_to_explain(monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[int, int, int]:
    """Times that a run's worth is reckoned, a part is accounted for, and a block of the book looked at."""
    rig, _ = full_in_parts(count, "cost")
    usage = rig.core.state.policies.usage
    assert isinstance(usage, CostUsage)
    book, account = usage._book, usage.account
    reckoned: list[Run] = []
    accounts: list[bytes] = []

    def watched(self: Book, run: Run, tier: TierName) -> float:
        reckoned.append(run)
        return worth(self, run, tier)

    def counted(block: bytes, *args: Any) -> Account | None:
        accounts.append(block)
        return account(block, *args)

    with monkeypatch.context() as patch:
        worth = Book.worth
        patch.setattr(Book, "worth", watched)
        patch.setattr(usage, "account", counted)
        patch.setattr(book, "blocks", Counting(book.blocks))
        explanation = rig.ask(Explain(conversation="chat-7", tenant="acme")).explanation
        looked_at = book.blocks.looked_at  # type: ignore[attr-defined]
    assert all(run.host_rank[1] == run.disk_rank[1] == count for run in explanation.runs)
    return len(reckoned), len(accounts), looked_at


def test_explaining_reckons_what_each_run_is_worth_once_for_all_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for count in (8, 32):
        reckoned, accounts, looked_at = reckoned_to_explain(monkeypatch, count)
        assert accounts == 4
        assert reckoned <= 2 * count + 4 * accounts
        assert looked_at < 10 * accounts


def test_parts_that_an_answer_has_no_room_for_are_not_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "_MOST_RUNS", 2)
    assert reckoned_to_explain(monkeypatch, 8)[1] == 2


class Watched(dict):  # type: ignore[type-arg]
    """Conversations that are over, and how often all of them were gone through."""

    walks = 0

    def items(self):  # type: ignore[no-untyped-def]
        self.walks += 1
        return super().items()

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.walks += 1
        return super().__iter__()


def test_conversations_that_are_over_are_told_once_and_not_gone_through() -> None:
    rig, _ = full(4, clean=4)
    state = rig.core.state
    state.ended = watched = Watched({("acme", f"gone-{n}"): 1 for n in range(50)})
    state.ended_news = dict.fromkeys(list(watched))
    watched.walks = 0
    rig.tick()
    (removal,) = rig.disk_ops()
    assert len(removal.message.records) == 50
    for _ in range(10):
        rig.tick()
    assert rig.disk_ops() == [removal]
    rig.finish(removal, "disk_error")
    rig.tick(10.0)
    (again,) = rig.disk_ops()
    assert len(again.message.records) == 50
    rig.run()
    assert len(watched) == 0
    assert watched.walks == 0
