"""The ranking of nodes against each option reckoned one by one."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.directory.locate import Line, NodeState, rank
from kvtier.directory.lookups import Front


class Quadratic:
    """Seconds of a prefill that grows with what is before it."""

    def __init__(self, token_s):
        self.token_s = token_s

    def seconds(self, past, new):
        return new * self.token_s * (1 + (past + new / 2) / 1000)


LINES = st.builds(Line, st.sampled_from([0.0, 0.01]), st.sampled_from([1e3, 1e4, 1e6]))
STATES = st.builds(
    NodeState,
    st.sampled_from([Quadratic(1e-3), Quadratic(1e-4)]),
    LINES,
    LINES,
    LINES,
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0, 5000]),
    st.booleans(),
)
NAMES = ["a", "b", "c", "d"]
FRONTS = st.lists(
    st.builds(
        Front,
        st.sampled_from([*NAMES, "stranger"]),
        st.just(1),
        st.just(1),
        st.sampled_from([16, 64, 128]),
        st.sampled_from([0, 1000, 9000]),
        st.sampled_from([0, 3000]),
    ),
    unique_by=lambda f: f.node,
)


def load_s(front, state):
    host = state.host.start_s + front.host_bytes / state.host.bytes_per_s if front.host_bytes else 0.0
    disk = state.disk.start_s + front.disk_bytes / state.disk.bytes_per_s if front.disk_bytes else 0.0
    return max(host, disk)


def plain_best(name, tokens, fronts, nodes):
    state = nodes[name]
    own = next((f for f in fronts if f.node == name), None)
    mine = min(own.tokens, tokens - 1) if own else 0
    mine_s = load_s(own, state) if own else 0.0
    options = [state.prefill.seconds(0, tokens), mine_s + state.prefill.seconds(mine, tokens - mine)]
    for front in fronts:
        reach = min(front.tokens, tokens - 1)
        if front.node not in nodes or reach <= mine:
            continue
        giver = nodes[front.node]
        tier = giver.disk if front.disk_bytes else giver.host
        pulled = int((1 - mine / front.tokens) * front.nbytes)
        queues = state.queued_bytes / state.link.bytes_per_s + giver.queued_bytes / giver.link.bytes_per_s
        rate = min(state.link.bytes_per_s, giver.link.bytes_per_s, tier.bytes_per_s)
        pull_s = state.link.start_s + tier.start_s + queues + pulled / rate
        options.append(max(mine_s, pull_s) + state.prefill.seconds(reach, tokens - reach))
    return state.wait_s + min(options)


@given(st.integers(1, 200), FRONTS, st.dictionaries(st.sampled_from(NAMES), STATES))
def test_every_node_is_ranked_by_its_best_option(tokens, fronts, nodes):
    ranked = rank(tokens, fronts, nodes)
    assert sorted(c.node for c in ranked) == sorted(n for n, s in nodes.items() if s.accepts)
    for choice in ranked:
        assert choice.expected_s == pytest.approx(plain_best(choice.node, tokens, fronts, nodes))
        assert 0 <= choice.tokens < max(tokens, 1)
        assert (choice.action == "pull") == bool(choice.source)
        assert choice.source in ("", *(f.node for f in fronts if f.node in nodes and f.node != choice.node))
    times = [choice.expected_s for choice in ranked]
    assert times == sorted(times)


FAST = Line(0.0, 1e9)
IDLE = NodeState(Quadratic(1e-3), FAST, FAST, FAST)
FRONT = Front("a", 1, 8, 128, 1000, 0)


def test_the_node_that_has_it_is_first_until_its_queue_is_longer_than_a_pull():
    ranked = rank(200, [FRONT], {"a": IDLE, "b": IDLE})
    assert [(c.node, c.action) for c in ranked] == [("a", "load"), ("b", "pull")]
    assert ranked[1].source == "a"
    assert ranked[1].pulled_bytes == 1000
    busy = rank(200, [FRONT], {"a": replace(IDLE, wait_s=1.0), "b": IDLE})
    assert [(c.node, c.action) for c in busy] == [("b", "pull"), ("a", "load")]


def test_computing_wins_over_a_slow_link():
    slow = replace(IDLE, link=Line(0.0, 10.0))
    assert rank(200, [FRONT], {"a": slow, "b": slow})[1].action == "compute"


def test_a_drained_node_gives_and_takes_nothing():
    ranked = rank(200, [FRONT], {"a": replace(IDLE, accepts=False), "b": IDLE})
    assert [(c.node, c.source) for c in ranked] == [("b", "a")]
    assert rank(200, [FRONT], {}) == []


def test_two_sources_the_quicker_one_is_taken():
    other = Front("b", 1, 8, 128, 0, 1000)
    nodes = {"a": IDLE, "b": replace(IDLE, disk=Line(1.0, 1e9)), "c": IDLE}
    assert {c.node: c.source for c in rank(200, [FRONT, other], nodes)}["c"] == "a"
