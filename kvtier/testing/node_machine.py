"""Anything in any order: the core among workers and services that come, go, stop, fail and answer late."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.messages import DropPlan, Forget, Forgotten, Hint, Mode, Planned
from kvtier.node import wire
from kvtier.node.blocks import ConversationId
from kvtier.node.coverage import Piece, restored_end
from kvtier.node.park_job import ParkJob
from kvtier.node.settings import NodeSettings
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import drain, pieces_of, problems, watch_promises
from kvtier.testing.rig_ops import Proc
from kvtier.testing.rig_uses import HYBRID, PLAIN, UNIT, RigWorker
from kvtier.tier_messages import Copy, DiskRemove

NAMES = st.sampled_from([("acme", "a"), ("acme", "a"), ("acme", "b"), ("rival", "a")])
LEVELS = st.sampled_from(["host", "disk", "disk"])
PRIVATE = st.sampled_from([None, None, None, 0, 5])
PICK = st.integers(0, 255)
MODES = st.sampled_from(["worker", "shared"])
# Two stories with a common front: every length of either is a turn, a regeneration or a fork.
TOLD = ([*range(24)], [*range(6), *range(100, 118)])
STORIES = st.integers(0, 1)
LENGTHS = st.integers(1, 18)
MOST_WORKERS = 3

ParkLevel: TypeAlias = Literal["host", "disk"]
Promise: TypeAlias = tuple[ConversationId, tuple[int, ...]]  # of these tokens


class NodeMachine(RuleBasedStateMachine):
    """See the module's text.

    small_disk, loosen: whether what is on disk may have to go, or may be found wrong.  promises: parks that
    were said to be on disk, each with the objects that it needs there.  forgotten: conversations that were
    not parked again since, each with the request for it; None for one that a node before this answered.
    """

    @initialize(
        plain=st.booleans(),
        verify=st.booleans(),
        disk_units=st.sampled_from([None, 12, 4000, 4000]),
        arena_units=st.sampled_from([(14,), (40,), (10, 10)]),
        spill_above=st.sampled_from([0.3, 1.0]),
        mode=MODES,
        late=st.booleans(),
    )
    def start(
        self,
        plain: bool,
        verify: bool,
        disk_units: int | None,
        arena_units: tuple[int, ...],
        spill_above: float,
        mode: Mode,
        late: bool,
    ) -> None:
        self.geometry = PLAIN if plain else HYBRID
        self.verify = verify
        self.small_disk = disk_units == 12
        self.promises: dict[Promise, tuple[ParkJob, set[tuple[bytes, int, str]]]] = {}
        base = NodeSettings(
            batch_bytes=2 * UNIT,
            batches_in_flight=2,
            verify=verify,
            disk_expected=disk_units is not None,
            spill_above=spill_above,
        )
        self.rig = CoreRig(
            arena_bytes=[units * UNIT for units in arena_units],
            disk=None if disk_units is None else disk_units * UNIT,
            settings=base,
            started=False,
        )
        self._start(late)
        self.forgotten: dict[ConversationId, int | None] = {}
        self.plans: list[tuple[RigWorker, Planned, int, int]] = []
        self.loosen = False
        self._watch()
        self.workers = [self.rig.attach(self.geometry, mode=mode)]

    def _start(self, late: bool) -> None:
        """The services of a node that begins; late: its disk comes some time after it."""
        self.rig.start_gpu()
        if self.rig.store is not None and not late:
            self.rig.start_disk()

    def _watch(self) -> None:
        watch_promises(self.rig, self._promised)
        arrive = self.rig._at_disk

        def watched(peer: str, message: Any) -> None:
            arrive(peer, message)
            if isinstance(message, DiskRemove):
                self._removed(message)

        self.rig._at_disk = watched  # type: ignore[method-assign]

    # -- promises of the disk

    def _promised(self, job: ParkJob, pieces: list[Piece]) -> None:
        tokens = self.rig.requests[job.message.request].pages.text.tokens
        keys = {wire.key_of(p.stored.meta.object_id) for p in pieces}
        # A longer turn of the same conversation takes the place of the ones that it continues.
        for other in [o for o in self.promises if o[0] == job.name and o[1] == tokens[: len(o[1])]]:
            del self.promises[other]
        # What the test has flipped is a promise that a check will break.
        on_disk = self.rig.store.objects if self.rig.store is not None else {}
        if not any(on_disk[key].corrupt for key in keys if key in on_disk):
            self.promises[job.name, tokens] = (job, keys)

    def _removed(self, message: Any) -> None:
        """Whatever the core removes from the disk, its promises stand: unless they may be broken."""
        gone = {tuple(key) for key in message.object_keys}
        names = {(r.tenant, r.conversation) for r in message.records}
        for promise, (job, keys) in list(self.promises.items()):
            if job.name in names:
                del self.promises[promise]
            elif keys & gone:
                del self.promises[promise]
                if not (self.small_disk or self.loosen):
                    self._check_promise(self.rig.restarted(), promise, job)

    def _check_promise(self, reborn: CoreRig, promise: Promise, job: ParkJob) -> None:
        pieces = pieces_of(reborn, job, promise[1])
        if restored_end(pieces) < len(promise[1]):
            known = self.rig.core.state.conversations.get(job.name)
            # A longer turn may be on disk although its park was told that it took too long.
            if known and any(e.key in known.durable and e.tokens > len(promise[1]) for e in known.ends):
                self.promises.pop(promise, None)
                return
            self.rig.violations.append(f"{promise} was promised to be on disk, there is {pieces}")
        self.promises[promise] = (job, {wire.key_of(p.stored.meta.object_id) for p in pieces})

    # -- conversations

    def _worker(self, pick: int) -> RigWorker:
        return self.workers[pick % len(self.workers)]

    def _park(self, worker: RigWorker, name: str, tokens: Sequence[int], **how: Any) -> None:
        self.forgotten.pop((how["tenant"], name), None)
        held = [0] * len(self.geometry.groups)
        if how.pop("late") and len(held) > 1:
            held[1] = self.geometry.groups[1].needed_from(len(tokens))
        self.rig.park(worker, name, tokens, held_from=held, **how)

    @rule(
        pick=PICK, who=NAMES, story=STORIES, length=LENGTHS, level=LEVELS, private=PRIVATE, late=st.booleans()
    )
    def park(
        self,
        pick: int,
        who: tuple[str, str],
        story: int,
        length: int,
        level: ParkLevel,
        private: int | None,
        late: bool,
    ) -> None:
        tenant, name = who
        self._park(
            self._worker(pick), name, TOLD[story][:length], tenant=tenant, level=level,
            private_from=private, late=late,
        )  # fmt: skip

    @rule(
        pick=PICK, who=NAMES, story=STORIES, length=LENGTHS, level=LEVELS, private=PRIVATE, late=st.booleans()
    )
    def park_all_the_way(
        self,
        pick: int,
        who: tuple[str, str],
        story: int,
        length: int,
        level: ParkLevel,
        private: int | None,
        late: bool,
    ) -> None:
        self.park(pick, who, story, length, level, private, late)
        self.rig.run()

    @rule(pick=PICK, who=NAMES, story=STORIES, length=LENGTHS)
    def plan(self, pick: int, who: tuple[str, str], story: int, length: int) -> None:
        (tenant, name), worker = who, self._worker(pick)
        planned = self.rig.plan(worker, name, TOLD[story][:length], tenant=tenant)
        if planned is not None and planned.plan.plan_id:
            self.plans.append((worker, planned, story, length))

    @precondition(lambda self: self.plans)
    @rule(pick=PICK, deadline_s=st.sampled_from([0.5, 20.0]))
    def restore(self, pick: int, deadline_s: float) -> None:
        worker, planned, story, length = self.plans.pop(pick % len(self.plans))
        if worker in self.workers:
            self.rig.restore(worker, planned, TOLD[story][:length], deadline_s=deadline_s)

    @precondition(lambda self: self.plans)
    @rule(pick=PICK, more=st.integers(1, 9), level=LEVELS, late=st.booleans())
    def park_after(self, pick: int, more: int, level: ParkLevel, late: bool) -> None:
        worker, planned, story, _ = self.plans[pick % len(self.plans)]
        if planned.front_tokens and worker in self.workers:
            self._park(
                worker, planned.plan.conversation, TOLD[story][: planned.front_tokens + more],
                tenant=planned.plan.tenant, level=level, after=planned, late=late,
            )  # fmt: skip

    @rule(pick=PICK, who=NAMES, what=st.sampled_from(["drop plan", "hint", "hint", "forget"]))
    def wish(self, pick: int, who: tuple[str, str], what: str) -> None:
        tenant, name = who
        if what == "drop plan" and self.plans:
            planned = self.plans.pop(pick % len(self.plans))[1]
            self.rig.ask(DropPlan(plan_id=planned.plan.plan_id))
        elif what == "hint":
            self.rig.ask(Hint(conversation=name, tenant=tenant, returns_in_s=5.0))
            if pick % 2:
                # Now it is on its way to the disk.
                self.rig.tick()
        elif what == "forget":
            for promise in [p for p in self.promises if p[0] == who]:
                del self.promises[promise]
            self.rig.ask(Forget(conversation=name, tenant=tenant))
            self.forgotten[who] = max(self.rig.answers)

    def _stays_forgotten(self, request: int | None) -> bool:
        """Whether the answer promised it for ever, and not only as long as this node lives."""
        return request is None or any(
            isinstance(answer, Forgotten) and answer.receipt.durable for answer in self.rig.answers[request]
        )

    # -- copies, the disk and time

    @rule(
        picks=st.lists(PICK, min_size=1, max_size=4),
        how=st.sampled_from(["begin", "finish", "finish", "fail"]),
    )
    def move(self, picks: list[int], how: str) -> None:
        for pick in picks:
            ops = [op for op in self.rig.ops if not op.executor.stopped]
            op = ops[pick % len(ops)] if ops else None
            if op is None:
                return
            if how == "begin" and not op.begun:
                self.rig.begin(op)
            elif how == "finish":
                self.rig.finish(op)
            elif how == "fail":
                failure = ("stale", "error: of the device")[pick % 2]
                refusal = ("disk_error", "wear")[pick % 2]
                self.rig.finish(op, failure if isinstance(op.message, Copy) else refusal)
                return

    @rule(only=st.sampled_from(["all", "all", "copies", "disk"]))
    def move_everything(self, only: str) -> None:
        {"all": self.rig.run, "copies": self.rig.run_copies, "disk": self.rig.run_disk}[only]()

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.6, 3.0, 11.0, 35.0, 70.0]))
    def tick(self, seconds: float) -> None:
        self.rig.tick(seconds)

    # -- trouble

    @rule(
        pick=PICK,
        mode=MODES,
        how=st.sampled_from(["attach", "kill", "kill", "disconnect", "stop", "stop", "bury"]),
    )
    def trouble_with_workers(self, pick: int, mode: Mode, how: str) -> None:
        worker, rig = self._worker(pick), self.rig
        lost = [p for p in rig.procs if p.alive and not p.connected]
        if how == "stop":
            worker.proc.stopped = not worker.proc.stopped
        elif how == "bury" and lost:
            rig.kill(lost[pick % len(lost)])
        elif how == "attach" and len(self.workers) < MOST_WORKERS:
            self.workers.append(rig.attach(self.geometry, mode=mode))
        elif how in ("kill", "disconnect"):
            self.workers.remove(worker)
            if how == "disconnect":
                rig.disconnect(worker.proc)
            else:
                rig.kill(worker.proc, socket_first=bool(pick % 2))
            if not self.workers:
                self.workers.append(rig.attach(self.geometry, mode=mode))

    @rule(
        pick=PICK,
        how=st.sampled_from(["kill gpu", "leave gpu", "kill disk", "leave disk", "lose answers", "break"]),
    )
    def trouble_with_services(self, pick: int, how: str) -> None:
        rig = self.rig
        if rig.gpu is None or (rig.disk is None and rig.store is not None):
            self._start_services()
        elif how == "kill gpu":
            rig.kill(rig.gpu)
        elif how == "leave gpu":
            self._leave(rig.gpu, rig.start_gpu, bool(pick % 2))
        elif rig.store is None or rig.disk is None:
            return
        elif how == "leave disk":
            self._leave(rig.disk, rig.start_disk, bool(pick % 2))
        elif how == "break":
            rig.store.broken = not rig.store.broken
            rig.say_usage(rig.disk)
        else:
            for op in rig.disk_ops() if how == "lose answers" else []:
                rig.finish(op, answer=False)
            rig.kill(rig.disk)

    def _leave(self, proc: Proc, start: Callable[..., Proc], comes_back: bool) -> None:
        """A service loses its node, ends what it was doing, and connects again."""
        self.rig.disconnect(proc)
        for op in [op for op in self.rig.ops if op.executor is proc]:
            self.rig.finish(op)
        if comes_back:
            start(pid=proc.pid)

    def _start_services(self) -> None:
        if self.rig.gpu is None:
            self.rig.start_gpu()
        if self.rig.disk is None and self.rig.store is not None:
            self.rig.start_disk()

    @precondition(lambda self: self.verify)
    @rule(pick=PICK, where=st.sampled_from(["host", "disk"]))
    def flip_a_bit(self, pick: int, where: str) -> None:
        rig = self.rig
        items = [item for op in rig.copies() if op.message.direction == "scatter" for item in op.items()]
        self.loosen = True
        if where == "host" and items:
            rig.corrupt_host(items[pick % len(items)])
        elif where == "disk" and rig.store is not None and rig.store.objects:
            rig.corrupt_disk(pick % len(rig.store.objects))
            self.promises.clear()

    @precondition(lambda self: self.rig.store is not None)
    @rule(mode=MODES, often=st.integers(0, 3), late=st.booleans())
    def lose_everything(self, mode: Mode, often: int, late: bool) -> None:
        """Power loss: what was promised to be on disk is there."""
        if often:
            return
        before = self.rig
        stay = [name for name, request in self.forgotten.items() if self._stays_forgotten(request)]
        self.forgotten = dict.fromkeys(stay)
        self.rig = whole = before.restarted()
        for promise, (job, _) in list(self.promises.items()):
            self._check_promise(whole, promise, job)
        if late:
            self.rig = before.restarted(started=False)
            self.rig.violations += whole.violations
            self._start(late)
        self._watch()
        self.plans = []
        self.workers = [self.rig.attach(self.geometry, mode=mode)]

    # -- what always holds

    @invariant()
    def nothing_wrong(self) -> None:
        if not hasattr(self, "rig"):
            return
        rig, state = self.rig, self.rig.core.state
        assert not rig.violations, "\n".join(rig.violations)
        assert state.conversations.keys().isdisjoint(self.forgotten), "what was forgotten came back"
        held = [p for plan in rig.core._plans._held.values() for p in plan.pieces if p.source == "host"]
        holds = Counter(id(piece.stored) for piece in held)
        for block in state.tree:
            assert all(s.pins >= 0 and s.holds == holds[id(s)] for s in block.parts.values())
        gone = [p for p in held if state.is_stored(p.stored) and not state.in_host(p.stored.meta.object_id)]
        assert not gone or rig.host.usage().quarantined, f"plans held {gone}"
        if rig.store is not None:
            assert state.disk_held_bytes <= rig.store.capacity_bytes

    def _at_rest(self) -> None:
        drain(self.rig)
        found = problems(self.rig)
        assert not found, "\n".join(found)

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        rig = self.rig
        if rig.store is not None:
            rig.store.broken = False
            if rig.disk is not None:
                rig.say_usage(rig.disk)
        drain(rig)
        self._start_services()
        self._at_rest()
        left = {name for block in rig.core.state.tree for name in block.names}
        for tenant, name in sorted(left):
            rig.ask(Forget(conversation=name, tenant=tenant))
        self._at_rest()
        assert rig.host.usage().used_bytes == 0
        assert len(rig.core.state.tree) == 0
        assert rig.store is None or not (rig.store.objects or rig.store.records)
