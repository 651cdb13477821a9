"""What deciding costs: the node's core alone, in this process, without sockets or memory."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Iterator

import numpy as np

from kvtier.bench.lines import Line, micros_line, seconds
from kvtier.bench.llama import BLOCK_TOKENS, PAGE_TOKENS
from kvtier.daemon.collector import set_survivors_aside
from kvtier.geometry import Geometry, GroupGeometry
from kvtier.host.slots import HostSlots
from kvtier.messages.calls import Attach, Attached, DropPlan, MakePlan, Message, Park, Ping, Planned
from kvtier.messages.tiers import Copied, Copy, TierHello
from kvtier.node.core import NodeCore
from kvtier.node.events import ArenaGrew, Received, Send
from kvtier.node.settings import NodeSettings
from kvtier.policy.defaults import make_policies
from kvtier.policy.usage import ParkedBlock, Turn

_TOKENS, _TURN_TOKENS = 32768, 500
_ROUNDS, _PINGS = 300, 3000
_ARENA_BYTES = 1 << 30
# Small objects: only their number matters here.
_TOKEN_BYTES = 64
# For evictions: blocks in each tier, those of one turn, and turns; one in three comes back, of the last ones.
_BLOCKS, _BLOCKS_A_TURN, _TURNS = 100_000, 32, 1000
_RETURNS, _RECENT, _BETWEEN_S = 0.33, 300, 0.5
_AIM_US = 20.0


class _Node:
    """A core with one worker, whose copies end at once."""

    def __init__(self) -> None:
        host = HostSlots([_ARENA_BYTES], ready_bytes=[0])
        settings = NodeSettings(disk_expected=False)
        self._core = NodeCore(
            settings,
            host,
            make_policies(),
            b"benchmark" * 4,
            random.Random(1),
            epoch=1,
            arena_bytes=[_ARENA_BYTES],
            generation_slots=1,
        )
        self._now_s = 0.0
        self._core.handle(0.0, ArenaGrew(0, _ARENA_BYTES))
        self.ask("gpu:1", TierHello(pid=1))
        geometry = Geometry(BLOCK_TOKENS, PAGE_TOKENS, (GroupGeometry("full", _TOKEN_BYTES),))
        attach = Attach(fingerprint=b"f" * 32, model="m", geometry=geometry, shard="all", layout="any")
        answers = [send.message for send in self.ask("client:1", attach)]
        self.worker = next(answer.worker for answer in answers if isinstance(answer, Attached))

    def ask(self, peer: str, message: Message) -> list[Send]:
        """What the core answers, a millisecond after the last question."""
        self._now_s += 0.001
        return self._core.handle(self._now_s, Received(peer, message))

    def park(self, tokens: bytes) -> None:
        """Park, and let all copies end."""
        park = Park(worker=self.worker, request=1, conversation="c", tenant="t", tokens=tokens)
        sends = self.ask("client:1", park)
        while sends:
            copies = [send.message for send in sends if isinstance(send.message, Copy)]
            ended = [Copied(job=c.job, batch=c.batch, ok=True, checksums=[1] * len(c.items)) for c in copies]
            sends = [send for copied in ended for send in self.ask("gpu:1", copied)]

    def plan(self, tokens: bytes, after: Planned | None = None) -> Planned:
        """Make a plan and drop it."""
        key, at = (after.front_key, after.front_tokens) if after else (b"", 0)
        make = MakePlan(
            worker=self.worker,
            conversation="c",
            tenant="t",
            tokens=tokens,
            after_key=key,
            after_tokens=at,
        )
        answers = [send.message for send in self.ask("client:1", make)]
        planned = next(answer for answer in answers if isinstance(answer, Planned))
        self.ask("client:1", DropPlan(plan_id=planned.plan.plan_id))
        return planned


class _Tiers:
    """What a policy is told and asked at a full host tier and a full disk, in the node's order."""

    def __init__(self, eviction: str) -> None:
        self._policies = make_policies(eviction)
        self._now_s = 1e6
        self._parked = 0
        self._waiting: deque[int] = deque()
        self._random = random.Random(1)
        for _ in range(_BLOCKS // _BLOCKS_A_TURN):
            self._park()

    def turn(self) -> None:
        """Somebody comes back or is new, parks, and as many blocks leave each tier."""
        if self._random.random() < _RETURNS:
            number = self._waiting[-self._random.randrange(1, _RECENT)]
            self._policies.usage.asked(("t", f"c{number}"), 1, self._now_s)
        self._park()
        for order in (self._policies.host, self._policies.disk):
            left = _BLOCKS_A_TURN
            for victim in order.victims(self._now_s):
                order.removed(victim)
                left -= 1
                if not left:
                    break

    def _park(self) -> None:
        policies, number = self._policies, self._parked
        self._parked += 1
        self._now_s += _BETWEEN_S
        policies.usage.passed(self._now_s, True, 0)
        name = ("t", f"c{number}")
        policies.usage.asked(name, 1, self._now_s)
        parent, chain = b"root", []
        for at in range(_BLOCKS_A_TURN):
            block = ParkedBlock(b"%032d" % (number * 1000 + at), at * 256, at * 256 + 256, 1 << 25)
            for order in (policies.host, policies.disk):
                order.added(block.key, parent, block.nbytes, self._now_s)
            chain.append(block)
            parent = block.key
        policies.usage.parked(name, chain, Turn("end_turn"), self._now_s)
        self._waiting.append(number)


def evictions() -> Iterator[Line]:
    """Microseconds for each block that comes to a full node and pushes out others, by worth and by last use.

    All that a policy does for it: noting it in two tiers, the wait, what is learned, and two victims. Time is
    this thread's CPU time, so that what else the machine does counts less. Python's collector sets aside what
    lives long, as it does in a node's service.
    """
    set_survivors_aside()
    tiers = {name: _Tiers(name) for name in ("lru", "cost")}
    taken: dict[str, list[float]] = {name: [] for name in tiers}
    for _ in range(_TURNS):
        for name, node in tiers.items():
            begun = time.thread_time()
            node.turn()
            taken[name].append((time.thread_time() - begun) / _BLOCKS_A_TURN)
    lru_us = statistics.mean(taken["lru"]) * 1e6
    for name, each in taken.items():
        mean_us = statistics.mean(each) * 1e6
        detail = {"blocks": _BLOCKS, "blocks_a_turn": _BLOCKS_A_TURN, "over_lru": round(mean_us / lru_us, 2)}
        detail |= {"turn_us": round(mean_us * _BLOCKS_A_TURN, 1)}
        what = f"decision: a block in, two out, at {_BLOCKS:,} blocks, {name}, amortised, CPU"
        yield Line(what, round(mean_us, 2), "us", _AIM_US, round(mean_us / _AIM_US, 3), detail)


def decisions() -> Iterator[Line]:
    """Microseconds of a plan over everything that is stored, of the next turn's, and of an empty call."""
    node = _Node()
    tokens = np.arange(_TOKENS, dtype="<u4").tobytes()
    turn = np.arange(_TURN_TOKENS, dtype="<u4").tobytes()
    node.park(tokens)
    known = node.plan(tokens)
    assert known.plan.load_tokens == _TOKENS, known
    whole = [seconds(lambda: node.plan(tokens)) for _ in range(_ROUNDS)]
    yield micros_line("decision: plan of 32,768 tokens, and its end", whole)
    after = [seconds(lambda: node.plan(turn, known)) for _ in range(_ROUNDS)]
    yield micros_line("decision: plan of the next turn after a known front, and its end", after)
    pings = [seconds(lambda: node.ask("client:1", Ping())) for _ in range(_PINGS)]
    yield micros_line("decision: an empty call", pings)
    yield from evictions()
