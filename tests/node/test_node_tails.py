"""Tails, regeneration, edits and forks: the longest front is found at every length."""

import itertools

import pytest

from kvtier.testing.core_rig import CoreRig

STORY = list(range(14))


def common(left, right):
    """Tokens that two lists begin with alike."""
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    )


def longest_front(parked, tokens, block=4):
    """What can be restored, from scratch: full blocks that agree, and tails that agree to their end.

    A tail is no more once the same conversation has a full block that contains it.
    """
    best = 0
    for index, text in enumerate(parked):
        alike = common(text, tokens)
        whole = -(-len(text) // block) * block
        is_contained = any(
            common(text, later) == len(text) and len(later) >= whole for later in parked[index + 1 :]
        )
        best = max(best, alike if alike == len(text) and not is_contained else alike - alike % block)
    return best


def parked(*texts, name="chat"):
    rig = CoreRig()
    worker = rig.attach()
    for text in texts:
        rig.park(worker, name, text)
        rig.run()
    return rig, worker


def found(rig, worker, tokens, name="chat"):
    return rig.plan(worker, name, tokens).plan.load_tokens


@pytest.mark.parametrize("length", range(1, len(STORY) + 1))
def test_a_parked_text_is_found_whole_by_itself_and_by_all_that_goes_on_from_it(length):
    rig, worker = parked(STORY[:length])
    for more in range(6):
        assert found(rig, worker, [*STORY[:length], *range(70, 70 + more)]) == length
    assert rig.resume(worker, "chat", STORY[:length]).receipt.tokens == length
    assert rig.violations == []


@pytest.mark.parametrize("first", range(1, len(STORY) + 1))
@pytest.mark.parametrize("edit", range(0, len(STORY) + 1, 3))
def test_edits_and_forks_find_the_longest_common_front(first, edit):
    forked = [*STORY[:edit], *range(80, 86)]
    rig, worker = parked(STORY[:first], forked)
    texts = [STORY[:first], forked]
    for tokens in ([*STORY, 1], forked, [*forked, 1], STORY[:first], STORY[: first - 1], [99]):
        assert found(rig, worker, tokens) == longest_front(texts, tokens), tokens


def test_branches_may_hold_several_tails_on_one_block():
    tails = [[*range(4), *range(60, 60 + n)] for n in (1, 2, 3)]
    others = [[*range(4), 70], [*range(4), 71, 72]]
    rig, worker = parked(*tails, *others)
    for text in (*tails, *others):
        assert found(rig, worker, [*text, 99]) == len(text)


def test_a_tail_is_found_without_the_conversations_name():
    rig, worker = parked(STORY[:10])
    assert found(rig, worker, STORY, name="") == 10
    assert found(rig, worker, STORY, name="another") == 10


def test_a_shorter_tail_is_taken_when_the_longer_one_is_not_all_there():
    rig, left = parked(STORY[:9])
    right = rig.attach(shard="s1")
    rig.park(right, "chat", STORY[:11])
    rig.run()
    assert found(rig, left, STORY) == 9
    assert found(rig, right, STORY) == 11
    assert rig.resume(left, "chat", STORY).receipt.tokens == 9


def tail_keys(rig):
    return [block.tokens for block in rig.core.state.tree if block.is_tail]


def test_a_tail_goes_once_a_full_block_contains_it(rig, worker):
    rig.park(worker, "chat", STORY[:10])
    rig.run()
    assert tail_keys(rig) == [2]
    rig.park(worker, "chat", STORY[:12])
    rig.run()
    assert tail_keys(rig) == []


def test_a_tail_on_disk_stays_until_the_block_that_contains_it_is_on_disk(rig, worker):
    rig.park(worker, "chat", STORY[:10], level="disk")
    rig.run()
    rig.park(worker, "chat", STORY[:13])
    rig.run()
    assert sorted(tail_keys(rig)) == [1, 2]
    reborn = rig.restarted()
    assert found(reborn, reborn.attach(), STORY) == 10
    longer = [*STORY, 14, 15]
    rig.park(worker, "chat", longer, level="disk")
    rig.run()
    assert tail_keys(rig) == []
    reborn = rig.restarted()
    assert found(reborn, reborn.attach(), longer) == 16


def test_a_tail_stays_as_long_as_a_conversation_ends_there(rig, worker):
    rig.park(worker, "one", STORY[:10])
    rig.park(worker, "two", STORY[:10])
    rig.run()
    rig.park(worker, "one", STORY[:12])
    rig.run()
    assert tail_keys(rig) == [2]
    assert found(rig, worker, [*STORY[:10], 99], name="two") == 10


def test_a_tail_that_is_being_restored_is_not_dropped(rig, worker):
    rig.park(worker, "chat", STORY[:10])
    rig.run()
    restore = rig.restore(worker, rig.plan(worker, "chat", STORY[:10]), STORY[:10])
    twin = rig.attach()
    rig.park(twin, "chat", STORY[:12])
    for op in [op for op in rig.copies() if op.executor is twin.proc]:
        rig.finish(op)
    rig.run()
    assert restore.receipt.tokens == 10


def test_the_newest_branch_is_the_head_and_the_oldest_of_too_many_lose_their_name(rig, worker):
    for branch in range(20):
        rig.park(worker, "chat", [*STORY[:4], 100 + branch])
        rig.run()
    (known,) = rig.core.state.conversations.values()
    assert len(known.heads) == rig.settings.max_heads
    assert known.heads[-1].tokens == 5
    assert found(rig, worker, [*STORY[:4], 100, 1]) == 5


def test_a_head_that_goes_on_from_another_takes_its_place(rig, worker):
    for length in (4, 6, 8, 11):
        rig.park(worker, "chat", STORY[:length])
        rig.run()
    (known,) = rig.core.state.conversations.values()
    assert [head.tokens for head in known.heads] == [11]
    assert known.version == 4


# --- share="conversation" ---------------------------------------------------------------------------------


@pytest.mark.parametrize("private_from", [0, 3, 4, 9])
def test_a_private_conversation_shares_nothing_from_its_token_on_and_is_found_again(
    rig, worker, private_from
):
    rig.park(worker, "public", STORY[:10])
    rig.run()
    park = rig.park(worker, "mine", STORY[:10], private_from=private_from)
    rig.run()
    shared = private_from // 4
    assert (park.receipt.objects_shared, park.receipt.objects_stored) == (shared, 3 - shared)
    assert rig.resume(worker, "mine", STORY).receipt.tokens == 10
    rig.park(worker, "theirs", STORY[:10], private_from=private_from)
    rig.run()
    assert rig.resume(worker, "theirs", STORY).receipt.tokens == 10


def test_nobody_else_finds_a_private_conversation():
    rig = CoreRig()
    worker = rig.attach()
    rig.park(worker, "mine", STORY[:10], private_from=4)
    rig.run()
    assert found(rig, worker, STORY, name="another") == 4
    assert found(rig, worker, STORY, name="") == 4


def test_a_private_conversation_goes_on_in_its_own_chain(rig, worker):
    rig.park(worker, "mine", STORY[:10], private_from=2, level="disk")
    rig.run()
    front = rig.plan(worker, "mine", STORY)
    park = rig.park(worker, "mine", STORY, private_from=10, after=front, level="disk")
    rig.run()
    assert park.receipt.objects_stored == 2
    reborn = rig.restarted()
    assert found(reborn, reborn.attach(), STORY, name="mine") == 14


def test_a_turn_that_is_parked_as_shared_after_a_private_front_stays_private_and_is_found(rig, worker):
    rig.park(worker, "mine", STORY[:8], private_from=0)
    rig.run()
    rig.park(worker, "mine", STORY[:12], after=rig.plan(worker, "mine", STORY))
    rig.run()
    assert found(rig, worker, STORY, name="mine") == 12
    assert found(rig, worker, STORY, name="another") == 0


def test_another_conversation_cannot_go_on_from_a_private_front(rig, worker):
    rig.park(worker, "mine", STORY[:8], private_from=0)
    rig.run()
    front = rig.plan(worker, "mine", STORY)
    assert rig.park(worker, "thief", STORY[:12], after=front).failed.error == "TokensError"
    assert rig.plan(worker, "thief", STORY, after=front).error == "TokensError"
    assert rig.plan(worker, "", STORY, after=front).error == "TokensError"


def test_a_private_conversation_does_not_go_on_from_a_front_that_is_shared(rig, worker):
    rig.park(worker, "chat", STORY[:8])
    rig.run()
    front = rig.plan(worker, "chat", STORY)
    park = rig.park(worker, "chat", STORY[:12], private_from=2, after=front)
    assert park.failed.error == "TokensError"
    assert "without a front" in park.failed.fix
    park = rig.park(worker, "chat", STORY[:12], private_from=8, after=front)
    rig.run()
    assert park.receipt.level == "host"
