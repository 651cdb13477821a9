"""Every policy against a slow one that is written from its rules alone."""

import random
from collections import OrderedDict, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.policy.baselines.arc import ArcCache
from kvtier.policy.baselines.clairvoyant import ClairvoyantCache
from kvtier.policy.baselines.gdsf import GdsfCache
from kvtier.policy.baselines.interfaces import Arrival, plain
from kvtier.policy.baselines.lru import LruCache, TtlCache
from kvtier.policy.baselines.s3fifo import S3FifoCache
from kvtier.policy.baselines.sieve import SieveCache
from kvtier.sim.future import future_of, lru_hits
from kvtier.sim.registry import Setup, make_policy
from kvtier.sim.replay import replay
from kvtier.sim.trace import Outcome, Row, TraceBuilder

TTL_S = 7.0


class Slow:
    """A set of blocks; every choice looks at all of them."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.resident = set()

    def serve(self, path, t_s):
        hit = next((i for i, block in enumerate(path) if block not in self.resident), len(path))
        self.take(path[: self.capacity])
        return hit

    def leaves(self, path):
        """Unpinned resident blocks on which no resident block stands."""
        inner = {self.parents.get(block) for block in self.resident}
        return [b for b in self.resident if b not in inner and b not in path]


class SlowLru(Slow):
    def __init__(self, capacity):
        super().__init__(capacity)
        self.used, self.clock = {}, 0

    def take(self, path):
        for block in reversed(path):
            if block not in self.resident and len(self.resident) == self.capacity:
                self.resident.remove(min(self.leaves(path), key=self.used.get))
            self.resident.add(block)
            self.clock += 1
            self.used[block] = self.clock


class SlowTtl(SlowLru):
    def __init__(self, capacity):
        super().__init__(capacity)
        self.when = {}

    def serve(self, path, t_s):
        self.resident = {b for b in self.resident if self.when[b] >= t_s - TTL_S}
        hit = super().serve(path, t_s)
        self.when |= dict.fromkeys(path, t_s)
        return hit


class SlowGdsf(Slow):
    def __init__(self, capacity):
        super().__init__(capacity)
        self.uses, self.key, self.used, self.clock, self.age = {}, {}, {}, 0, 0.0

    def take(self, path):
        for block in reversed(path):
            if block not in self.resident:
                if len(self.resident) == self.capacity:
                    gone = min(self.leaves(path), key=lambda b: (self.key[b], self.used[b]))
                    self.age = self.key[gone]
                    self.resident.remove(gone)
                self.resident.add(block)
                self.uses[block] = 0
            self.uses[block] += 1
            self.clock += 1
            self.used[block] = self.clock
        for depth, block in enumerate(path):
            self.key[block] = self.age + self.uses[block] * (1 + (depth + 1) * 16 / 30000)


class SlowSieve(Slow):
    def __init__(self, capacity):
        super().__init__(capacity)
        self.queue, self.visited, self.hand = [], set(), None

    def take(self, path):
        for block in reversed(path):
            if block in self.resident:
                self.visited.add(block)
                continue
            if len(self.queue) == self.capacity:
                self.evict(path)
            self.queue.append(block)
            self.resident.add(block)

    def evict(self, path):
        at = self.queue.index(self.hand) if self.hand is not None else 0
        while self.queue[at] in path or self.queue[at] in self.visited:
            if self.queue[at] not in path:
                self.visited.remove(self.queue[at])
            at = (at + 1) % len(self.queue)
        self.resident.remove(self.queue.pop(at))
        self.hand = self.queue[at] if at < len(self.queue) else None


class SlowS3Fifo(Slow):
    def __init__(self, capacity):
        super().__init__(capacity)
        self.small, self.main, self.ghost, self.uses = deque(), deque(), deque(), {}

    def take(self, path):
        for block in path:
            if block in self.resident:
                self.uses[block] = min(3, self.uses[block] + 1)
        for block in reversed(path):
            if block in self.resident:
                continue
            if len(self.resident) == self.capacity:
                self.evict(path)
            to = self.small
            if block in self.ghost:
                self.ghost.remove(block)
                to = self.main
            while len(self.ghost) > self.capacity * 9 // 10:
                self.ghost.popleft()
            to.append(block)
            self.uses[block] = 0
            self.resident.add(block)

    def evict(self, path):
        small_at_limit = max(self.capacity // 10, 1)
        while True:
            # The oldest that came in with this request means that all of the small queue did.
            closed = self.small and self.small[0] in path and not self.uses[self.small[0]]
            if (len(self.small) >= small_at_limit or not self.main) and not closed:
                block = self.small.popleft()
                if self.uses[block] == 0:
                    self.ghost.append(block)
                    return self.resident.remove(block)
                self.uses[block] = 0
                self.main.append(block)
            elif any(block not in path for block in self.main):
                block = self.main.popleft()
                if self.uses[block] == 0 and block not in path:
                    return self.resident.remove(block)
                self.uses[block] = max(0, self.uses[block] - 1)
                self.main.append(block)
            else:
                block = next(block for block in self.small if block not in path)
                self.small.remove(block)
                return self.resident.remove(block)


class SlowArc(Slow):
    def __init__(self, capacity):
        super().__init__(capacity)
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict() for _ in range(4))
        self.p = 0.0

    def take(self, path):
        hits = [block for block in reversed(path) if block in self.resident]
        for block in hits:
            self.t1.pop(block, None)
            self.t2.pop(block, None)
            self.t2[block] = None
        for block in reversed(path):
            if block in hits:
                self.t2.move_to_end(block)
            else:
                self.miss(block, path)
            self.resident = set(self.t1) | set(self.t2)

    def miss(self, block, path):
        c, t1, t2, b1, b2 = self.capacity, self.t1, self.t2, self.b1, self.b2
        in_b1, in_b2, ghost = block in b1, block in b2, True
        if in_b1:
            self.p = min(c, self.p + max(len(b2) / len(b1), 1))
        elif in_b2:
            self.p = max(0, self.p - max(len(b1) / len(b2), 1))
        elif len(t1) + len(b1) >= c:
            if len(t1) < c:
                b1.popitem(last=False)
            else:
                ghost = False
        elif len(t1) + len(t2) + len(b1) + len(b2) >= 2 * c:
            b2.popitem(last=False)
        if len(t1) + len(t2) >= c:
            once = t1 and (len(t1) > self.p or (in_b2 and len(t1) == int(self.p)))
            sides = [(t1, b1), (t2, b2)] if once else [(t2, b2), (t1, b1)]
            live, dead = next(s for s in sides if any(b not in path for b in s[0]))
            gone = next(b for b in live if b not in path)
            del live[gone]
            if ghost:
                dead[gone] = None
        b1.pop(block, None)
        b2.pop(block, None)
        (t2 if in_b1 or in_b2 else t1)[block] = None


class SlowBound(Slow):
    def __init__(self, capacity, paths):
        super().__init__(capacity)
        self.paths, self.row = paths, 0

    def next_use(self, block):
        coming = range(self.row + 1, len(self.paths))
        return next((row for row in coming if block in self.paths[row]), len(self.paths))

    def serve(self, path, t_s):
        self.row = self.paths.index(path, self.row) if self.paths[self.row] != path else self.row
        hit = next((i for i, block in enumerate(path) if block not in self.resident), len(path))
        wanted = [b for b in self.resident | set(path) if self.next_use(b) < len(self.paths)]
        self.resident = set(sorted(wanted, key=lambda b: (self.next_use(b), self.depth[b]))[: self.capacity])
        self.row += 1
        return hit


def trace_from(choices):
    """A random forest: (which earlier path, how much of it is shared, new blocks, seconds until)."""
    builder, t_s = TraceBuilder(), 0.0
    for ref, shared, new, gap_s in choices:
        leaf, depth = -1, 0
        if len(builder):
            ref %= len(builder)
            depth = min(shared, builder.blocks[ref])
            leaf = builder.chains.ancestor(builder.leaf[ref], depth - 1)
        if new:
            leaf = builder.chains.extend(leaf, depth, new)
        t_s += gap_s
        builder.add(Row(t_s, -1, -1, (depth + new) * 16, "", Outcome(0, "", -1.0), leaf, depth + new))
    return builder.build("random", 16)


traces = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 9), st.integers(0, 4), st.sampled_from([0.0, 1.0, 5.0])),
    min_size=1,
    max_size=45,
).map(trace_from)

PAIRS = {
    "lru": (lambda c: LruCache(c, plain), SlowLru),
    "ttl": (lambda c: TtlCache(c, TTL_S, plain), SlowTtl),
    "arc": (lambda c: ArcCache(c, plain), SlowArc),
    "s3fifo": (lambda c: S3FifoCache(c, plain), SlowS3Fifo),
    "sieve": (lambda c: SieveCache(c, plain), SlowSieve),
    "gdsf": (lambda c: GdsfCache(c, 16, plain), SlowGdsf),
}


def arrival(trace, row):
    return Arrival(row, float(trace.t_s[row]), -1, -1, 0, "", trace.path(row), None)


def agree(trace, fast, slow):
    slow.parents = dict(enumerate(trace.parent.tolist()))
    slow.depth = {b: d for r in range(len(trace)) for d, b in enumerate(trace.path(r).tolist())}
    for row in range(len(trace)):
        served = fast.serve(arrival(trace, row))
        path = trace.path(row).tolist()
        assert served.hit == slow.serve(path, float(trace.t_s[row]))
        assert set(np.flatnonzero(fast.resident).tolist()) == slow.resident
        assert len(slow.resident) <= slow.capacity


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=150, deadline=None)
@given(trace=traces, capacity=st.integers(1, 25))
def test_a_policy_does_what_its_rules_say(name, trace, capacity):
    make_fast, make_slow = PAIRS[name]
    agree(trace, make_fast(capacity), make_slow(capacity))


@settings(max_examples=200, deadline=None)
@given(trace=traces, capacity=st.integers(1, 25))
def test_the_bound_keeps_what_is_used_soonest(trace, capacity):
    paths = [trace.path(row).tolist() for row in range(len(trace))]
    agree(trace, ClairvoyantCache(capacity, future_of(trace), plain), SlowBound(capacity, paths))


def best_possible(paths, capacity, parents):
    """Most hits over all ways to keep prefix-closed sets: every reachable set is tried."""
    reach = {frozenset(): 0}
    for path in paths:
        after = {}
        for held, hits in reach.items():
            hits += next((i for i, b in enumerate(path) if b not in held), len(path))
            stack, seen = [held | set(path)], set()
            while stack:
                kept = stack.pop()
                seen.add(kept)
                if len(kept) <= capacity:
                    after[kept] = max(after.get(kept, -1), hits)
                inner = {parents[b] for b in kept}
                stack += [s for b in kept if b not in inner and (s := kept - {b}) not in seen]
        reach = after
    return max(reach.values())


@pytest.mark.parametrize("seed", range(12))
def test_no_way_to_keep_blocks_beats_the_bound(seed):
    chance = random.Random(seed)
    choices = [(chance.randrange(9), chance.randrange(4), chance.randrange(2), 1.0) for _ in range(9)]
    trace = trace_from([(0, 0, 3, 0.0), *choices])
    paths = [trace.path(row).tolist() for row in range(len(trace))]
    parents = dict(enumerate(trace.parent.tolist()))
    for capacity in (1, 2, 4):
        cache = ClairvoyantCache(capacity, future_of(trace), plain)
        hits = sum(cache.serve(arrival(trace, row)).hit for row in range(len(trace)))
        assert hits == best_possible(paths, capacity, parents)


@settings(max_examples=100, deadline=None)
@given(trace=traces)
def test_the_curve_of_lru_is_lru_at_every_size(trace):
    curve = lru_hits(trace)
    for capacity in range(1, trace.unique_blocks + 1):
        cache = LruCache(capacity, plain)
        assert curve[capacity] == sum(cache.serve(arrival(trace, row)).hit for row in range(len(trace)))


@pytest.mark.parametrize("name", [*PAIRS, "clairvoyant"])
def test_compiled_and_plain_do_the_same(rows_of, trace_of, name):
    trace = trace_of(rows_of(7, requests=400))
    capacity = 40
    slow = (
        ClairvoyantCache(capacity, future_of(trace), plain)
        if name == "clairvoyant"
        else PAIRS[name][0](capacity)
    )
    seen, expected = [], []
    for policy, log in ((make_policy(name, Setup(capacity, 16, ttl_s=TTL_S), trace), seen), (slow, expected)):

        def note(row, served, log=log):
            log.append((served.hit, served.evicted.tolist(), served.bypassed.tolist()))

        replay(trace, policy, on_served=note)
    assert seen == expected
    assert any(evicted for _, evicted, _ in seen)
