"""Ranks with slices of their own find at other nodes what such ranks have parked: all of it, or none."""

import msgspec
import pytest

from kvtier.messages import cluster as c
from kvtier.messages import protocol
from kvtier.messages.calls import Locate, Planned
from kvtier.node import elsewhere
from kvtier.node.coverage import longest
from kvtier.testing.rig_cluster import RigCluster, end_well, pair
from kvtier.testing.rig_ranks import PAIR, at_rest, levels, park_all, ranks_of, resume_all, tokens_of
from kvtier.testing.rig_uses import HYBRID, PLAIN

FOUR = [f"L0+2.H{i}+1" for i in range(4)]


def parked_at(rig, shards=PAIR, tokens=10, **how):
    """Ranks of one engine park 'chat' to its end, and everybody hears of it."""
    parks = park_all(rig, ranks_of(rig, shards), tokens, **how)
    rig.cluster.announce()
    return levels(parks)


def one_rank_more(rig, tokens):
    """The first rank alone has parked a longer turn; the other one never came."""
    ranks = ranks_of(rig)
    rig.park(ranks[0], "chat", range(tokens), timeout_s=1.0)
    rig.run()
    rig.tick(2.0)
    rig.cluster.announce()


@pytest.mark.parametrize("geometry", [PLAIN, HYBRID])
@pytest.mark.parametrize("level", ["host", "disk"])
def test_four_ranks_go_on_at_another_node_bit_for_bit(geometry, level):
    there, here = pair()
    park_all(there, ranks_of(there, FOUR, [geometry] * 4), level=level)
    there.cluster.announce()
    planned, got = resume_all(here, ranks_of(here, FOUR, [geometry] * 4))
    assert [part.source for part in planned.plan.ranges] == ["peer", "compute"]
    here.run()
    assert tokens_of(got) == [10] * 4
    assert [use.receipt.sources for use in got] == [{"peer": 10}] * 4
    # It is here from then on, by slices.
    planned, _ = resume_all(here, here.workers[-4:], 10)
    assert [part.source for part in planned.plan.ranges] == ["host"]
    at_rest(here)
    end_well(there, here)


def test_slices_may_lie_at_nodes_of_their_own():
    """Stages of a pipeline were on two nodes, and are on a third one now."""
    cluster = RigCluster("a", "b", "d")
    a, b, here = cluster.rigs.values()
    for rig, shard in zip((a, b), PAIR, strict=True):
        assert parked_at(rig, [shard]) == [("host", "")]
    planned, got = resume_all(here, ranks_of(here))
    assert planned.plan.load_tokens == 10
    assert {pull.node for pull in here.pulls} == {"a", "b"}
    here.run()
    assert tokens_of(got) == [10, 10]
    end_well(*cluster.rigs.values())


def test_a_slice_that_is_here_is_asked_of_nobody():
    there, here = pair()
    parked_at(there)
    parked_at(here, PAIR[:1])
    _, got = resume_all(here, ranks_of(here))
    assert {key[2] for pull in here.pulls for key in pull.object_keys} == {PAIR[1]}
    here.run()
    assert tokens_of(got) == [10, 10]
    end_well(there, here)


def test_a_slice_that_nobody_has_further_ends_the_plan_for_all():
    there, here = pair()
    parked_at(there, tokens=8)
    one_rank_more(there, 16)
    ranks = ranks_of(here)
    planned, got = resume_all(here, ranks, 16)
    assert (planned.plan.load_tokens, planned.plan.reason) == (8, "shard_missing")
    assert planned.plan.detail == f"beyond 8 tokens nobody has {PAIR[1]}"
    here.run()
    assert tokens_of(got) == [8, 8]
    end_well(there, here)


def test_a_slice_that_nobody_has_at_all_is_named():
    there, here = pair()
    one_rank_more(there, 16)
    plan = here.plan(ranks_of(here)[0], "chat", range(16)).plan
    assert (plan.plan_id, plan.load_tokens, plan.reason) == ("", 0, "shard_missing")
    assert PAIR[1] in plan.detail and PAIR[0] not in plan.detail
    end_well(there, here)


def test_a_peer_that_does_not_answer_is_followed_by_the_next():
    cluster = RigCluster("a", "b", "d")
    a, b, here = cluster.rigs.values()
    parked_at(a)
    parked_at(b)
    cluster.cut.add("a")
    _, got = resume_all(here, ranks_of(here))
    assert {pull.node for pull in here.pulls} == {"b"}
    here.run()
    assert tokens_of(got) == [10, 10]
    end_well(b, here)


def test_a_peer_that_dies_in_the_middle_leaves_the_front_that_all_have():
    there, here = pair()
    parked_at(there, tokens=16)
    _, got = resume_all(here, ranks_of(here), 16)
    first = here.pulls[0]
    while same := [pull for pull in here.pulls if pull.object_keys[0][2] == first.object_keys[0][2]]:
        here.finish_pull(same[0])
    assert here.pulls and not any(use.receipts for use in got)
    here.finish_pull(here.pulls[0])
    here.run_copies()
    there.cluster.lose("a")
    while here.pulls:
        here.finish_pull(here.pulls[0], "peer_lost")
    here.run()
    (tokens,) = set(tokens_of(got))
    assert 0 < tokens < 16
    assert {use.receipt.reason for use in got} == {"peer_lost"}
    at_rest(here)


def test_a_flipped_bit_on_the_way_to_one_rank_shortens_all():
    there, here = pair()
    parked_at(there)
    _, got = resume_all(here, ranks_of(here))
    pulled = next(pull for pull in here.pulls if pull.object_keys[0][2] == PAIR[1])
    here.finish_pull(pulled, flip=True)
    here.run()
    assert len(set(tokens_of(got))) == 1
    assert tokens_of(got)[0] < 10
    assert {use.receipt.reason for use in got} == {"corrupt"}
    end_well(there, here)


def test_a_rank_that_has_gone_while_others_were_asked_is_missing():
    there, here = pair()
    parked_at(there)
    ranks = ranks_of(here)
    cluster = there.cluster
    answer, asked = cluster.at_directory, []
    cluster.at_directory = lambda rig, message: asked.append((rig, message))
    assert here.plan(ranks[0], "chat", range(10)) is None
    here.kill(ranks[1].proc)
    cluster.at_directory = answer
    for question in asked:
        answer(*question)
    (planned,) = [one for answers in here.answers.values() for one in answers if isinstance(one, Planned)]
    plan = planned.plan
    assert (plan.plan_id, plan.load_tokens) == ("", 0)
    assert not here.core._plans._held
    end_well(there)
    at_rest(here, died=True)


def test_a_directory_that_does_not_answer_costs_ranks_a_bounded_wait():
    there, here = pair()
    parked_at(there)
    there.cluster.at_directory = lambda rig, message: None
    worker = ranks_of(here)[0]
    assert here.plan(worker, "chat", range(10)) is None
    here.tick(0.26)
    assert not here.core._plans._deferred


@pytest.mark.parametrize("silent", [c.FindBranches, c.FindHolders, ()])
def test_a_directory_that_does_not_answer_hides_no_slice_that_is_missing(silent):
    _, here = pair()
    park_all(here, ranks_of(here), 8)
    worker = here.workers[-2]
    here.park(worker, "chat", range(16), timeout_s=1.0)
    here.run()
    here.tick(2.0)
    answer = here.cluster.at_directory
    here.cluster.at_directory = lambda rig, asked: None if isinstance(asked, silent) else answer(rig, asked)
    planned = here.plan(worker, "chat", range(16))
    assert (planned is None) == bool(silent)
    here.tick(0.26)
    (planned,) = [one for answers in here.answers.values() for one in answers if isinstance(one, Planned)]
    assert (planned.plan.load_tokens, planned.plan.reason) == (8, "shard_missing")
    assert planned.plan.detail == f"beyond 8 tokens nobody has {PAIR[1]}"


def believe_the_directory(monkeypatch):
    """Whatever a node has, it counts as what the directory said of it."""
    end = elsewhere.Elsewhere._end
    monkeypatch.setattr(elsewhere.Elsewhere, "_end", lambda *of: 99 if of[-2] else end(*of))


def told_too_much(there):
    """The directory says of every slice that node a has 16 tokens of it; of one it has 8."""
    cluster = there.cluster
    answer = cluster._answer

    def wrong(rig, message):
        right = answer(rig, message)
        if not isinstance(right, c.Holders):
            return right
        return msgspec.structs.replace(right, fronts=tuple(f._replace(tokens=16) for f in right.fronts))

    cluster._answer = wrong
    parked_at(there, tokens=8)
    one_rank_more(there, 16)


def test_what_the_directory_says_too_much_is_not_planned():
    there, here = pair()
    told_too_much(there)
    planned, got = resume_all(here, ranks_of(here), 16)
    assert planned.plan.load_tokens == 8
    here.run()
    assert tokens_of(got) == [8, 8]
    end_well(there, here)


def test_and_one_slice_that_speaks_for_all_brings_nothing(monkeypatch):
    """The control: the plan would promise what cannot come, and the receipts would not."""
    there, here = pair()
    told_too_much(there)
    monkeypatch.setattr(
        elsewhere,
        "covered",
        lambda blocks, slices, source_of, at_most: longest(blocks, PLAIN, PAIR[0], source_of, at_most),
    )
    believe_the_directory(monkeypatch)
    planned, got = resume_all(here, ranks_of(here), 16)
    assert planned.plan.load_tokens == 16
    here.run()
    assert tokens_of(got) == [0, 0]


def less_than_was_said():
    """The directory says that node a reaches 16 tokens and node b 12; by now a has 8 of them."""
    cluster = RigCluster("a", "b", "d", disk=None)
    a, b, here = cluster.rigs.values()
    for rig, tokens in ((b, 12), (a, 16)):
        parked_at(rig, tokens=tokens)
    state = a.core.state
    for block in [block for block in state.tree if block.end > 8]:
        for stored in list(block.parts.values()):
            state.remove_from_host(block, stored)
    return here


def test_a_node_that_has_less_than_was_said_is_followed_by_the_one_that_has_more():
    here = less_than_was_said()
    planned, got = resume_all(here, ranks_of(here), 16)
    assert planned.plan.load_tokens == 12
    assert {pull.node for pull in here.pulls} == {"b"}
    here.run()
    assert tokens_of(got) == [12, 12]
    end_well(here)


def test_and_would_end_the_search_if_it_counted_as_all(monkeypatch):
    here = less_than_was_said()
    believe_the_directory(monkeypatch)
    planned, _ = resume_all(here, ranks_of(here), 16)
    assert planned.plan.load_tokens == 8


def test_a_node_that_has_less_than_was_said_still_gives_that():
    here = less_than_was_said()
    here.cluster.lose("b")
    planned, got = resume_all(here, ranks_of(here), 16)
    assert planned.plan.load_tokens == 8
    here.run()
    assert tokens_of(got) == [8, 8]
    end_well(here)


def test_who_wants_less_than_there_is_asks_nobody_twice(monkeypatch):
    """What one node has is all that is asked for: the next one, which may hang, is not waited for."""
    answered = []
    hear = elsewhere.Elsewhere.on_these_are
    monkeypatch.setattr(
        elsewhere.Elsewhere,
        "on_these_are",
        lambda self, peer, message: answered.append(message.job) or hear(self, peer, message),
    )
    a, b, here = RigCluster("a", "b", "d", disk=None).rigs.values()
    for rig in (a, b):
        parked_at(rig, tokens=16)
    ranks = ranks_of(here)
    assert here.plan(ranks[0], "chat", range(16), most_tokens=10).plan.load_tokens == 8
    assert len(answered) == len(ranks)


def test_the_blocks_of_a_chain_are_put_together_once_for_all_of_its_slices(monkeypatch):
    _, here = pair()
    park_all(here, ranks_of(here, FOUR))
    made = []
    block = elsewhere.Elsewhere._block
    monkeypatch.setattr(
        elsewhere.Elsewhere,
        "_block",
        lambda self, root, ref, there: made.append(ref.key) or block(self, root, ref, there),
    )
    assert here.plan(here.workers[-4], "chat", range(40)).plan.load_tokens == 10
    assert made and len(made) == len(set(made))


def test_a_node_that_lacks_a_slice_is_not_where_the_next_turn_goes():
    cluster = RigCluster("a", "b", "d")
    a, b, here = cluster.rigs.values()
    parked_at(a)
    parked_at(b, PAIR[:1])
    ranks_of(here)
    tokens = b"".join(token.to_bytes(4, "little") for token in range(10))
    located = here.ask(Locate(conversation="chat", tenant="acme", tokens=tokens))
    assert [(node, held) for node, held, _ in located.nodes] == [("a", 10)]
    end_well(*cluster.rigs.values())


def test_what_was_logged_before_ranks_asked_is_read_as_the_workers_own_slice():
    old = protocol.encode(c.Holders(job="e1", fronts=(c.Reach(0, "a", 1, 10, 5, 6, "of old"),)))
    assert b"of old" in old
    kept = old.replace(b"\x97\x00\xa1a\x01\x0a\x05\x06\xa6of old", b"\x96\x00\xa1a\x01\x0a\x05\x06")
    length = (int.from_bytes(kept[:4], "little") - 7).to_bytes(4, "little")
    found = protocol.decode((length + kept[4:])[protocol.LENGTH.size :])
    assert found.fronts == (c.Reach(0, "a", 1, 10, 5, 6),)
    assert found.fronts[0].shard == ""
