"""Looking up what is stored of some tokens, choosing what to load, and holding it for a while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from kvtier.errors import KvtierError
from kvtier.geometry import Geometry
from kvtier.messages import MakePlan, Planned
from kvtier.node.blocks import Block, ConversationId
from kvtier.node.coverage import Piece, Source, longest, restored_end
from kvtier.node.limits import check_seconds
from kvtier.node.lookup import Query, match
from kvtier.node.parks import Parks
from kvtier.node.state import NodeState, Worker, count
from kvtier.policy.interfaces import Segment
from kvtier.receipts import Plan, Reason, TokenRange


@dataclass(frozen=True, slots=True)
class HeldPlan:
    """A plan, and the pieces that it holds in host memory and pins on disk.

    blocks: in order; all of them, also those that are not loaded.
    """

    plan: Plan
    worker: Worker
    geometry: Geometry
    blocks: tuple[Block, ...]
    pieces: tuple[Piece, ...]
    until_s: float


@dataclass(frozen=True, slots=True)
class _Deferred:
    peer: str
    message: MakePlan
    worker: Worker
    until_s: float


class Plans:
    """Makes plans, and ends those that nobody used in time."""

    def __init__(self, state: NodeState, parks: Parks) -> None:
        self._state = state
        self._parks = parks
        self._held: dict[str, HeldPlan] = {}
        self._deferred: list[_Deferred] = []

    def make(self, peer: str, message: MakePlan, worker: Worker) -> None:
        """Answer a MakePlan; a park of the same conversation that still copies is waited for, shortly.

        Raises the caller's mistakes as KvtierError.
        """
        check_seconds("lease_s", message.lease_s)
        until_s = self._state.now_s + self._state.settings.wait_for_park_s
        deferred = _Deferred(peer, message, worker, until_s)
        if self._must_wait(deferred):
            self._deferred.append(deferred)
        else:
            self._answer(deferred)

    def advance_all(self) -> None:
        """Answer those whose park has ended, or who waited long enough."""
        ready = [d for d in self._deferred if not self._must_wait(d) or self._state.now_s >= d.until_s]
        self._deferred = [d for d in self._deferred if d not in ready]
        for deferred in ready:
            try:
                self._answer(deferred)
            except KvtierError as error:
                self._state.refuse(deferred.peer, deferred.message, error)

    def take(self, plan_id: str, worker: Worker) -> HeldPlan | None:
        """Hand a plan over to its restore, with what it holds; None when it is unknown or has ended."""
        held = self._held.get(plan_id)
        if held is None or held.worker is not worker:
            return None
        return self._held.pop(plan_id)

    def drop(self, plan_id: str) -> None:
        """End a plan's holds. Unknown plans are no error."""
        held = self._held.pop(plan_id, None)
        if held is not None:
            self.leased(held)
            self.release(held)

    def leased(self, held: HeldPlan) -> None:
        """Who took the plan has leases now on what it wants of host memory: the plan holds no more there."""
        for piece in held.pieces:
            if piece.source == "host":
                piece.stored.holds -= 1
        del self._state.plan_ends_s[held.plan.plan_id]

    def release(self, held: HeldPlan) -> None:
        """The restore of a plan that was taken is over: nothing is pinned on disk for it any more."""
        for piece in held.pieces:
            if piece.source == "disk":
                piece.stored.pins -= 1

    def worker_left(self, worker: Worker) -> None:
        """Nobody will use the worker's plans."""
        self._deferred = [d for d in self._deferred if d.worker is not worker]
        for plan_id in [p for p, held in self._held.items() if held.worker is worker]:
            self.drop(plan_id)

    def tick(self) -> None:
        """End the plans that were not used in time."""
        for plan_id in [p for p, held in self._held.items() if held.until_s <= self._state.now_s]:
            self.drop(plan_id)

    # --- choosing ---------------------------------------------------------------------------------------

    def _must_wait(self, deferred: _Deferred) -> bool:
        name = (deferred.message.tenant, deferred.message.conversation)
        return bool(deferred.message.conversation) and self._parks.copying(name)

    def _answer(self, deferred: _Deferred) -> None:
        message, worker, state = deferred.message, deferred.worker, self._state
        query = Query(message.tokens, message.after_key, message.after_tokens, tuple(message.extras))
        geometry = worker.geometry.at(message.fidelity)
        blocks, pieces = self._best(message, worker, query)
        segments = _segments(pieces)
        choice = state.policies.restore.choose(segments, query.end)
        if choice.tokens < restored_end(pieces):
            pieces = longest(blocks, geometry, worker.shard, state.source_of, choice.tokens)
            segments = _segments(pieces)
        loads = restored_end(pieces)
        reason = "" if loads else self._why_nothing(message, blocks)
        if reason:
            count(state.counters.misses, reason)
        lease_s = min(message.lease_s, state.settings.plan_lease_s)
        known = state.conversations.get((message.tenant, message.conversation))
        plan = Plan(
            plan_id=state.next_id("n") if loads else "",
            conversation=message.conversation,
            tenant=message.tenant,
            tokens=query.end,
            ranges=_ranges(segments, query.end),
            eta_s=(choice.eta_low_s, choice.eta_high_s) if loads else (0.0, 0.0),
            lease_s=lease_s if loads else 0.0,
            bytes=sum(p.stored.meta.nbytes for p in pieces),
            version=known.version if known else 0,
            reason=reason,
        )
        if loads:
            until_s = state.now_s + lease_s
            self._hold(HeldPlan(plan, worker, geometry, tuple(blocks), tuple(pieces), until_s))
        full = [b for b in blocks if not b.is_tail]
        front = full[-1] if full else None
        state.send(
            deferred.peer,
            Planned(
                id=message.id,
                plan=plan,
                front_key=front.key if front else b"",
                front_tokens=front.end if front else 0,
            ),
        )

    def _best(self, message: MakePlan, worker: Worker, query: Query) -> tuple[list[Block], list[Piece]]:
        """The longest restorable front over all branches, however they were keyed."""
        state = self._state
        geometry = worker.geometry.at(message.fidelity)
        root = state.root(message.tenant, worker.fingerprint, message.fidelity, worker.geometry.block_tokens)
        name = (message.tenant, message.conversation)
        known = state.conversations.get(name)
        privates = known.privates() if known else []
        best: tuple[list[Block], list[Piece]] = ([], [])
        for private in [*privates, *([] if None in privates else [None])]:
            for blocks in match(state.tree, root, query, name, private):
                pieces = longest(blocks, geometry, worker.shard, state.source_of, query.end)
                better = restored_end(pieces) > restored_end(best[1])
                if better or (not best[1] and len(blocks) > len(best[0])):
                    best = (blocks, pieces)
                if restored_end(best[1]) >= blocks[-1].end:
                    # Those that follow are shorter.
                    break
        return best

    def _why_nothing(self, message: MakePlan, blocks: Sequence[Block]) -> Reason:
        if blocks:
            return "incomplete"
        name: ConversationId = (message.tenant, message.conversation)
        unknown = message.conversation and name not in self._state.conversations
        return "unknown_conversation" if unknown else "no_match"

    def _hold(self, held: HeldPlan) -> None:
        state = self._state
        for piece in held.pieces:
            state.used(piece.stored)
            if piece.source == "host":
                piece.stored.holds += 1
            else:
                piece.stored.pins += 1
        self._held[held.plan.plan_id] = held
        state.plan_ends_s[held.plan.plan_id] = held.until_s


def _segments(pieces: Sequence[Piece]) -> list[Segment]:
    """One for each block: of the slower tier when its parts lie in both."""
    segments: list[Segment] = []
    for piece in pieces:
        meta = piece.stored.meta
        if segments and segments[-1].start == meta.start:
            last = segments[-1]
            source: Source = "disk" if "disk" in (last.source, piece.source) else "host"
            segments[-1] = Segment(last.start, last.end, source, last.nbytes + meta.nbytes)
        else:
            segments.append(Segment(meta.start, meta.start + meta.tokens, piece.source, meta.nbytes))
    return segments


def _ranges(segments: Sequence[Segment], tokens: int) -> tuple[TokenRange, ...]:
    """Runs of one source that cover [0, tokens), what is not loaded last."""
    ranges: list[TokenRange] = []
    # A chain of sliding layers only begins at its window: what is before it needs no bytes at all.
    start = 0
    for segment, after in zip_longest(segments, segments[1:]):
        if after is None or after.source != segment.source:
            ranges.append(TokenRange(start, segment.end, segment.source))
            start = segment.end
    if start < tokens:
        ranges.append(TokenRange(start, tokens, "compute"))
    return tuple(ranges)
