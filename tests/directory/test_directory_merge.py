"""Records of one conversation from several nodes: their order and repetition do not matter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.directory import merge as rules
from kvtier.directory.announcements import End, Record
from kvtier.directory.merge import NOTHING, Said, Stamp, State, living, longest, merge, view

IDS = ("x", "y")
ENDS = st.builds(
    End,
    st.sampled_from([b"k1", b"k2", b"k3"]),
    st.sampled_from([16, 32]),
    st.sampled_from([1.0, 2.0]),
)
RECORDS = st.builds(
    Record,
    st.just("acme"),
    st.just("chat"),
    st.integers(0, 3),
    st.lists(ENDS, max_size=2, unique_by=lambda e: (e.key, e.tokens)).map(tuple),
    st.sets(st.sampled_from(IDS)).map(lambda ids: tuple(sorted(ids))),
)


def said(record, epoch=1, snapshot=0):
    return Said(Stamp(epoch, snapshot, record.version), record)


SAID = st.builds(said, RECORDS, st.integers(0, 2), st.integers(0, 1))
STATES = st.builds(
    State, st.dictionaries(st.sampled_from(["a", "b", "c"]), SAID), st.frozensets(st.sampled_from(IDS))
)


@given(STATES, STATES, STATES)
def test_merge_is_a_join(one, two, three):
    assert merge(one, two) == merge(two, one)
    assert merge(merge(one, two), three) == merge(one, merge(two, three))
    assert merge(one, one) == one
    assert merge(one, NOTHING) == one


@given(st.lists(STATES, max_size=4), st.randoms())
def test_the_view_depends_on_what_was_said_and_not_on_when(states, random):
    other = [*states, *states]
    random.shuffle(other)
    assert fold(states) == fold(other)


def fold(states):
    state = NOTHING
    for each in states:
        state = merge(state, each)
    return view("acme", "chat", state)


@given(STATES, STATES)
def test_a_later_epoch_wins_whatever_its_version(one, two):
    both = merge(one, two)
    for node in both.said:
        every = [s.said[node].stamp for s in (one, two) if node in s.said]
        assert both.said[node].stamp == max(every)


@given(STATES)
def test_a_tombstone_kills_what_did_not_know_of_it(state):
    for said_ in living(state).values():
        assert state.tombstones <= set(said_.record.after)
        assert said_.record.ends
    assert not living(merge(state, State({}, frozenset({"new"}))))


def test_the_last_message_winning_would_be_seen(monkeypatch):
    monkeypatch.setattr(rules, "_rank", lambda said_: 0)
    early, late = (State({"a": said(record(v, "k1"))}) for v in (1, 2))
    assert rules.merge(early, late) != rules.merge(late, early)


def record(version, *keys, after=(), at_s=0.0, tokens=16):
    ends = tuple(End(key.encode(), tokens, at_s + n) for n, key in enumerate(keys))
    return Record("acme", "chat", version, ends, tuple(after))


def test_the_end_of_a_record_wins_over_the_record_of_the_same_version():
    here, ended = State({"a": said(record(4, "k1"))}), State({"a": said(record(4))})
    assert not living(merge(here, ended))
    assert not living(merge(ended, here))


def test_both_branches_of_a_conversation_that_went_on_at_two_nodes_are_listed():
    state = merge(
        State({"a": said(record(7, "k1", "k2", at_s=1.0))}),
        State({"b": said(record(3, "k1", "k3", at_s=5.0))}),
    )
    found = view("acme", "chat", state)
    assert found is not None
    assert [(b.end.key, dict(b.nodes)) for b in found.branches] == [
        (b"k3", {"b": 3}),
        (b"k1", {"a": 7, "b": 3}),
        (b"k2", {"a": 7}),
    ]
    assert found.versions == {"a": 7, "b": 3}


def test_a_restore_takes_the_longest_branch_of_its_tokens_and_not_the_newest():
    ends = (End(b"old", 32, 1.0), End(b"new", 16, 9.0), End(b"salted", 64, 2.0, (8, b"salt")))
    state = State({"a": said(Record("acme", "chat", 1, ends))})
    conversation = view("acme", "chat", state)
    assert conversation is not None

    def tokens_of_old(tokens, private):
        return {16: b"new", 32: b"old", 64: b"salted"}.get(tokens) if private is None else b"another"

    best = longest(conversation, tokens_of_old)
    assert best is not None
    assert best.end.key == b"old"
    assert longest(conversation, lambda tokens, private: None) is None


@pytest.mark.parametrize(
    ("after", "lives"), [((), False), (("x",), True), (("x", "z"), True), (("z",), False)]
)
def test_parked_after_it_was_forgotten(after, lives):
    state = State({"a": said(record(1, "k1", after=after))}, frozenset({"x"}))
    assert (view("acme", "chat", state) is not None) == lives
