"""Computing from the front while loading from the back, with a real model: where they meet, what comes."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.mixed_restore import BLOCK, TOLERANCE, Engine, difference, learned_rate, plan

TOKENS = 3 * BLOCK


@pytest.fixture(scope="module")
def engine():
    return Engine(TOKENS)


@pytest.fixture(scope="module")
def rate(engine):
    return learned_rate(engine, 1)


def test_all_three_ways_go_on_alike(engine, rate):
    results = [
        engine.load_all(0.01, engine.parked),
        engine.compute_all(),
        engine.both(rate.seconds(0, TOKENS), engine.parked, rate),
    ]
    assert [result.computed for result in results[:2]] == [0, TOKENS]
    assert 0 <= results[2].computed <= TOKENS
    for result in results:
        assert difference(engine, result) < TOLERANCE
        assert result.seconds > 0


def test_the_tail_of_another_conversation_is_seen(engine):
    assert difference(engine, engine.load_all(0.01, engine.another)) > 10 * TOLERANCE


def test_the_policy_learns_from_real_prefills_and_expects_no_loss(engine, rate):
    assert rate.prefills == 4
    load_s = rate.seconds(0, TOKENS)
    expected = plan(engine, rate, load_s)
    assert expected.ttft_s <= min(expected.load_ttft_s, expected.recompute_ttft_s)
    assert 0 <= expected.compute_front <= expected.load_end <= TOKENS
