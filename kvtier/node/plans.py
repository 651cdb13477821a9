"""Looking up what is stored of some tokens, choosing what to load, and holding it for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec

from kvtier.errors import KvtierError
from kvtier.messages.calls import JoinPlan, MakePlan, Planned
from kvtier.node import held_cost, limits
from kvtier.node.blocks import Block, ConversationId
from kvtier.node.choosing import Chooser, Chosen, Front, check_wishes
from kvtier.node.counters import count
from kvtier.node.coverage import Piece, restored_end
from kvtier.node.elsewhere import Elsewhere, Lookup, Remotes
from kvtier.node.held_plan import HeldPlan, SharedPlan
from kvtier.node.limits import check_seconds
from kvtier.node.lookup import Query, match, wanted_end
from kvtier.node.parks import Parks
from kvtier.node.ranks import Slices, absent, covered, lacking, of_same_ranks, present, slices_of
from kvtier.node.state import NodeState, Worker
from kvtier.receipts import Plan, Reason


@dataclass(frozen=True, slots=True)
class _Deferred:
    """asked_s: when it came.  lookup: what the cluster is asked for it."""

    peer: str
    message: MakePlan
    worker: Worker
    asked_s: float
    until_s: float
    lookup: Lookup | None = None


class _Found(NamedTuple):
    """What a plan can be made of. lacks: slices without which it would reach further."""

    blocks: list[Block]
    pieces: list[Piece]
    remotes: Remotes
    lacks: list[str]


class Plans:
    """Makes plans, and ends those that nobody used in time."""

    def __init__(self, state: NodeState, parks: Parks, elsewhere: Elsewhere, chooser: Chooser) -> None:
        self._state = state
        self._parks = parks
        self._chooser = chooser
        self._elsewhere = elsewhere
        self._held: dict[str, HeldPlan] = {}
        # Those of several ranks of which some have not taken their part.
        self._shared: dict[str, SharedPlan] = {}
        self._deferred: list[_Deferred] = []

    def make(self, peer: str, message: MakePlan, worker: Worker) -> None:
        """Answer a MakePlan; a park of the same conversation that still copies is waited for, shortly.

        Raises the caller's mistakes as KvtierError.
        """
        check_seconds("lease_s", message.lease_s)
        check_wishes(message)
        until_s = max(self._state.now_s + self._state.settings.wait_for_park_s, self._state.serves_from_s)
        deferred = _Deferred(peer, message, worker, self._state.now_s, until_s)
        if len(self._held) >= limits.MOST_PLANS:
            # Somebody makes plans and does not use them: the oldest goes.
            self._drop(next(iter(self._held)))
        if len(self._deferred) < limits.MOST_WAITING and self._must_wait(deferred):
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

    def front(self, message: MakePlan, worker: Worker) -> list[Piece]:
        """What is here of the tokens and could be restored."""
        query = Query(message.tokens, message.after_key, message.after_tokens, tuple(message.extras))
        return self._best(message, worker, query)[1]

    def take(self, plan_id: str, worker: Worker) -> HeldPlan | None:
        """Hand a plan over to its restore, with what it holds; None when it is unknown or has ended."""
        shared = self._shared.get(plan_id)
        if shared is not None and of_same_ranks(shared.worker, worker):
            part = shared.part_of(worker)
            shared.took.add(worker.name)
            return self._pop(part)
        held = self._held.get(plan_id)
        if held is None or held.worker is not worker or held.shared is not None:
            return None
        return self._pop(plan_id)

    def join(self, peer: str, message: JoinPlan, worker: Worker) -> None:
        """Tell a rank the plan that another one made for all of them."""
        shared = self._shared.get(message.plan_id)
        if shared is None or not (of_same_ranks(shared.worker, worker) and shared.part_of(worker)):
            why = "no plan of this name waits for this rank"
            nothing = Plan("", "", "", 0, (), reason="lease_expired", detail=why)
            self._state.send(peer, Planned(id=message.id, plan=nothing))
            return
        self._state.send(peer, msgspec.structs.replace(shared.answer, id=message.id))

    def drop(self, plan_id: str) -> None:
        """End a plan's holds, for all its ranks. Unknown plans are no error."""
        shared = self._shared.get(plan_id)
        for part in list(shared.left) if shared is not None else [plan_id]:
            self._drop(part)

    def _drop(self, part: str) -> None:
        held = self._pop(part)
        if held is None:
            return
        self.leased(held)
        self.release(held)
        if held.shared is not None:
            held.shared.lost = held.shared.lost or f"nobody took the part of {held.shard} in time"

    def _pop(self, part: str) -> HeldPlan | None:
        held = self._held.pop(part, None)
        if held is not None and held.shared is not None:
            del held.shared.left[part]
            if not held.shared.left:
                del self._shared[held.shared.plan_id]
        return held

    def leased(self, held: HeldPlan) -> None:
        """Who took the plan has leases now on what it wants of host memory: the plan holds no more there."""
        for stored, source in held.pieces:
            if source == "host":
                stored.holds -= 1
        del self._state.plan_ends_s[held.plan.plan_id]

    def release(self, held: HeldPlan) -> None:
        """The restore of a plan that was taken is over: nothing is pinned on disk for it any more."""
        for stored, source in held.pieces:
            if source == "disk":
                stored.pins -= 1

    def worker_left(self, worker: Worker) -> None:
        """Nobody will use the worker's plans."""
        for deferred in self._deferred:
            if deferred.worker is worker and deferred.lookup is not None:
                self._elsewhere.end(deferred.lookup)
        self._deferred = [d for d in self._deferred if d.worker is not worker]
        for part in [p for p, held in self._held.items() if held.worker is worker]:
            self._drop(part)
        for shared in list(self._shared.values()):
            if shared.part_of(worker) and not self._may_come(shared, worker.shard):
                self.drop(shared.plan_id)

    def _may_come(self, shared: SharedPlan, shard: str) -> bool:
        """Whether a rank with this shard is there, which may have its part still to take."""
        workers = [w for w in self._state.workers.values() if w.connected and w.shard == shard]
        return any(of_same_ranks(shared.worker, w) and shared.part_of(w) for w in workers)

    def tick(self) -> None:
        """End the plans that were not used in time."""
        for plan_id in [p for p, held in self._held.items() if held.until_s <= self._state.now_s]:
            self._drop(plan_id)

    # --- choosing ---------------------------------------------------------------------------------------

    def _must_wait(self, deferred: _Deferred) -> bool:
        if deferred.lookup is not None:
            return not deferred.lookup.over
        if self._state.now_s < self._state.serves_from_s:
            return True
        name = (deferred.message.tenant, deferred.message.conversation)
        return bool(deferred.message.conversation) and self._parks.copying(name)

    def _answer(self, deferred: _Deferred) -> None:
        message, worker, state = deferred.message, deferred.worker, self._state
        query = Query(message.tokens, message.after_key, message.after_tokens, tuple(message.extras))
        slices = slices_of(state, worker, message.fidelity)
        found = self._found(deferred, query, slices)
        if found is None:
            return
        blocks, pieces, remotes, lacks = found
        where = self._elsewhere.source_in(remotes) if remotes else state.source_of
        front = Front(blocks, pieces, where, slices, _most_of(remotes))
        waited_s = state.now_s - deferred.asked_s
        chosen = self._chooser.choose(message, worker, front, query.end, waited_s)
        choice, loads = chosen.choice, bool(chosen.pieces)
        reason = "" if loads else self._why_nothing(message, blocks, chosen, slices)
        if lacks and (loads or not chosen.stored):
            reason = "shard_missing"
        if chosen.stored:
            count(state.counters.eta.ways, chosen.way)
        if reason and reason != "recompute" and not loads:
            count(state.counters.misses, reason)
        lease_s = min(message.lease_s, state.settings.plan_lease_s)
        known = state.conversations.get((message.tenant, message.conversation))
        plan = Plan(
            plan_id=state.next_id("n") if loads else "",
            conversation=message.conversation,
            tenant=message.tenant,
            tokens=query.end,
            ranges=chosen.ranges(query.end),
            eta_s=(choice.eta_low_s, choice.eta_high_s) if loads else (0.0, 0.0),
            lease_s=lease_s if loads else 0.0,
            bytes=sum(asked.nbytes for asked in chosen.asked),
            version=known.version if known else 0,
            reason=reason,
            eta_mid_s=choice.eta_mid_s if loads else 0.0,
            why=choice.why if chosen.stored else "",
            load_ttft_s=choice.load_s,
            recompute_ttft_s=choice.recompute_s,
            cost_per_hour=None if remotes else held_cost.of_blocks(state, blocks),
            saved_gpu_s=chosen.saved_gpu_s(worker, query.end) if loads else 0.0,
            detail=_what_is_missing(slices, lacks, restored_end(pieces)) if reason == "shard_missing" else "",
        )
        # A park can only go on after what is here.
        there = (b for b in reversed(blocks) if not b.is_tail and state.tree.get(b.key) is not None)
        last = next(there, None)
        key, tokens = (last.key, last.end) if last else (b"", 0)
        answer = Planned(id=message.id, plan=plan, front_key=key, front_tokens=tokens)
        if loads:
            geometry = worker.geometry.at(message.fidelity)
            until_s, pieces = state.now_s + lease_s, chosen.pieces
            held = HeldPlan(
                plan, worker, worker.shard, geometry, tuple(blocks), tuple(pieces), until_s, chosen, remotes
            )
            for part in held.parts(slices, answer):
                self._hold(part)
        state.send(deferred.peer, answer)

    def _found(self, deferred: _Deferred, query: Query, slices: Slices) -> _Found | None:
        """The longest restorable front, here or with other nodes' help; None: others are asked first."""
        blocks, pieces = self._best(deferred.message, deferred.worker, query)
        at_most = wanted_end(deferred.message, query)
        lookup = deferred.lookup
        if lookup is None:
            if not absent(slices) and len(self._deferred) < limits.MOST_WAITING:
                tokens = restored_end(pieces)
                lookup = self._elsewhere.begin(
                    deferred.message, deferred.worker, query, present(slices), tokens
                )
            if lookup is not None:
                until_s = self._state.now_s + self._state.settings.ask_elsewhere_s
                self._deferred.append(replace(deferred, lookup=lookup, until_s=until_s))
                return None
            return _Found(blocks, pieces, {}, lacking(blocks, slices, self._state.source_of, at_most))
        self._elsewhere.end(lookup)
        # Where nobody answered, what is here alone says it.
        lacks = (
            self._elsewhere.lacking(lookup)
            if lookup.sought
            else lacking(blocks, slices, self._state.source_of, at_most)
        )
        # A rank may have gone meanwhile.
        merged = None if absent(slices) else self._elsewhere.merged(lookup)
        if merged is None or restored_end(merged[2]) <= restored_end(pieces):
            return _Found(blocks, pieces, {}, lacks)
        return _Found(merged[1], merged[2], merged[0], lacks)

    def _best(self, message: MakePlan, worker: Worker, query: Query) -> tuple[list[Block], list[Piece]]:
        """The longest restorable front over all branches, however they were keyed."""
        state = self._state
        slices = slices_of(state, worker, message.fidelity)
        at_most = wanted_end(message, query)
        root = state.root(message.tenant, worker.fingerprint, message.fidelity, worker.geometry.block_tokens)
        name = (message.tenant, message.conversation)
        known = state.conversations.get(name)
        privates = known.privates() if known else []
        best: tuple[list[Block], list[Piece]] = ([], [])
        for private in [*privates, *([] if None in privates else [None])]:
            for blocks in match(state.tree, root, query, name, private):
                pieces = covered(blocks, slices, state.source_of, at_most)
                better = restored_end(pieces) > restored_end(best[1])
                if better or (not best[1] and len(blocks) > len(best[0])):
                    best = (blocks, pieces)
                if restored_end(best[1]) >= blocks[-1].end:
                    # Those that follow are shorter.
                    break
        return best

    def _why_nothing(
        self, message: MakePlan, blocks: Sequence[Block], chosen: Chosen, slices: Slices
    ) -> Reason:
        if chosen.stored:
            return "deadline" if chosen.choice.late else "recompute"
        if blocks:
            return "shard_missing" if absent(slices) else "incomplete"
        name: ConversationId = (message.tenant, message.conversation)
        unknown = message.conversation and name not in self._state.conversations
        return "unknown_conversation" if unknown else "no_match"

    def _hold(self, held: HeldPlan) -> None:
        state = self._state
        for stored, source in held.pieces:
            if source == "host":
                stored.holds += 1
            else:
                stored.pins += 1
        state.used(stored for stored, _ in held.pieces)
        self._held[held.plan.plan_id] = held
        if held.shared is not None:
            self._shared[held.shared.plan_id] = held.shared
        state.plan_ends_s[held.plan.plan_id] = held.until_s


def _what_is_missing(slices: Slices, lacks: Sequence[str], tokens: int) -> str:
    if absent(slices):
        return f"no worker has {absent(slices)}"
    return f"beyond {tokens} tokens nobody has {', '.join(lacks)}"


def _most_of(remotes: Remotes) -> str:
    """The node that most slices come from; '' for none."""
    nodes = Counter(remote.node for remote in remotes.values())
    return max(sorted(nodes), key=lambda node: nodes[node], default="")
