"""What deciding costs: the node's core alone, in this process, without sockets or memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from benchmarks.lines import Line, micros_line, seconds
from benchmarks.llama import BLOCK_TOKENS, PAGE_TOKENS
from kvtier.geometry import Geometry, GroupGeometry
from kvtier.host.slots import HostSlots
from kvtier.messages import Attach, Attached, DropPlan, MakePlan, Message, Park, Ping, Planned
from kvtier.node.core import NodeCore
from kvtier.node.events import ArenaGrew, Received, Send
from kvtier.node.settings import NodeSettings
from kvtier.policy.defaults import make_policies
from kvtier.tier_messages import Copied, Copy, TierHello

_TOKENS, _TURN_TOKENS = 32768, 500
_ROUNDS, _PINGS = 300, 3000
_ARENA_BYTES = 1 << 30
# Small objects: only their number matters here.
_TOKEN_BYTES = 64


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
