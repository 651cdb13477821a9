"""The baselines alone: sizes that are odd, and parts that several of them use."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policy.baselines.arc import ArcCache
from kvtier.policy.baselines.flat import NONE
from kvtier.policy.baselines.gdsf import GdsfCache
from kvtier.policy.baselines.heap import heap_kernels
from kvtier.policy.baselines.interfaces import Arrival, plain
from kvtier.policy.baselines.lru import LruCache
from kvtier.policy.baselines.s3fifo import S3FifoCache
from kvtier.policy.baselines.sieve import SieveCache
from kvtier.policy.baselines.tlru import TlruCache
from kvtier.policy.baselines.two_tiers import TwoTiers

CACHES = {
    "lru": lambda c: LruCache(c, plain),
    "arc": lambda c: ArcCache(c, plain),
    "s3fifo": lambda c: S3FifoCache(c, plain),
    "sieve": lambda c: SieveCache(c, plain),
    "gdsf": lambda c: GdsfCache(c, 16, plain),
    "tlru": lambda c: TlruCache(c, 16, 40, plain),
}
each = pytest.mark.parametrize("name", CACHES)


def arrival(*path):
    return Arrival(0, 0.0, -1, -1, 0, "", np.array(path, np.int32), None)


@each
def test_a_path_without_blocks_does_nothing(name):
    cache = CACHES[name](3)
    cache.serve(arrival(0, 1))
    served = cache.serve(arrival())
    assert (served.hit, len(served.evicted), len(served.bypassed)) == (0, 0, 0)
    assert cache.serve(arrival(0, 1)).hit == 2


@each
def test_a_path_over_the_capacity_keeps_its_front(name):
    cache = CACHES[name](3)
    cache.serve(arrival(9))
    served = cache.serve(arrival(0, 1, 2, 3, 4))
    assert served.evicted.tolist() == [9]
    assert served.bypassed.tolist() == [3, 4]
    assert cache.serve(arrival(0, 1, 2, 3, 4)).hit == 3


@each
def test_the_request_at_hand_is_pinned(name):
    cache = CACHES[name](4)
    cache.serve(arrival(0, 1))
    cache.serve(arrival(5, 6))
    served = cache.serve(arrival(0, 1, 2, 3))
    assert served.hit == 2
    assert sorted(served.evicted.tolist()) == [5, 6]
    assert cache.serve(arrival(0, 1, 2, 3)).hit == 4


def test_gdsf_prefers_blocks_that_are_dear_and_often_used():
    cache = GdsfCache(3, 30000, plain)
    for path in ((0,), (0,), (1,), (2,)):
        cache.serve(arrival(*path))
    assert cache.serve(arrival(3)).evicted.tolist() == [1]
    dear = GdsfCache(3, 30000, plain)
    dear.serve(arrival(0, 1))
    dear.serve(arrival(2))
    assert dear.serve(arrival(3)).evicted.tolist() == [2]


def test_tlru_lets_go_of_what_the_next_turn_can_compute_in_time():
    cache = TlruCache(6, 16, 40, plain)
    cache.serve(arrival(0, 1, 2, 3))
    # Four blocks are 64 tokens; two blocks are needed to have no more than 40 left, and the other two spare.
    assert cache.serve(arrival(4, 5, 6)).evicted.tolist() == [3]
    assert cache.serve(arrival(7)).evicted.tolist() == [2]
    assert cache.serve(arrival(8)).evicted.tolist() == [6]


def test_tlru_without_a_threshold_is_lru():
    tail, lru = TlruCache(6, 16, 0, plain), LruCache(6, plain)
    for path in ((0, 1, 2, 3), (4, 5, 6), (0, 1, 7), (4,), (8, 9), (0, 1, 2)):
        one, other = tail.serve(arrival(*path)), lru.serve(arrival(*path))
        assert (one.hit, one.evicted.tolist()) == (other.hit, other.evicted.tolist())


def test_tlru_keeps_what_something_firm_stands_on():
    cache = TlruCache(9, 16, 40, plain)
    cache.serve(arrival(0, 1, 2, 3, 4, 5, 6))
    # Now 1 and 2 would be spare, but 3 and 4 are firm and stand on them.
    assert cache.serve(arrival(0, 1, 2)).evicted.tolist() == []
    assert cache.serve(arrival(7, 8, 9, 10)).evicted.tolist() == [6, 5]
    assert cache.serve(arrival(11, 12)).evicted.tolist() == [10, 9]


def test_a_copy_in_the_slow_tier_is_not_written_again():
    tiers = TwoTiers(LruCache(1, plain), LruCache(2, plain))
    assert tiers.serve(arrival(0)).slow_writes == 0
    assert tiers.serve(arrival(1)).slow_writes == 1
    for block, writes in ((0, 1), (1, 0), (0, 0), (1, 0)):
        served = tiers.serve(arrival(block))
        assert (served.hit, served.slow_writes) == (1, writes)


def test_what_the_fast_tier_cannot_hold_goes_to_the_slow_one():
    tiers = TwoTiers(LruCache(2, plain), LruCache(4, plain))
    assert tiers.serve(arrival(0, 1, 2, 3)).slow_writes == 2
    assert tiers.serve(arrival(0, 1, 2, 3)).hit == 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=60), st.randoms())
def test_the_heap_is_a_heap(steps, chance):
    put, drop = heap_kernels(plain)
    worth = np.array([chance.randrange(4) for _ in range(12)], np.float64)
    stamp = np.array(chance.sample(range(50), 12), np.int64)
    heap, place, size = np.zeros(12, np.int32), np.full(12, NONE, np.int32), 0
    held = set()
    for add, block in steps:
        if add and block not in held:
            size = put(heap, place, size, worth, stamp, block)
            held.add(block)
        elif not add and block in held:
            size = drop(heap, place, size, worth, stamp, block)
            held.remove(block)
        assert size == len(held)
        assert {b for b in range(12) if place[b] != NONE} == held
        if held:
            assert heap[0] == heapq.nsmallest(1, held, key=lambda b: (worth[b], stamp[b]))[0]
