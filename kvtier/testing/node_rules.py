"""What a state machine does to a node: workers and services that come, go, stop, fail and answer late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvtier.geometry import Geometry
from kvtier.messages.calls import DropPlan, Forget, Forgotten, Hint, Mode, Planned
from kvtier.messages.tiers import Copy
from kvtier.node.blocks import ConversationId
from kvtier.node.settings import NodeSettings
from kvtier.receipts import AskedLevel
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.node_promises import Promises
from kvtier.testing.rig_ops import Proc
from kvtier.testing.rig_uses import HYBRID, PLAIN, UNIT, RigWorker

NAMES = st.sampled_from([("acme", "a"), ("acme", "a"), ("acme", "b"), ("rival", "a")])
LEVELS: st.SearchStrategy[AskedLevel] = st.sampled_from(["host", "disk", "disk"])
PRIVATE = st.sampled_from([None, None, None, 0, 5])
PICK = st.integers(0, 255)
MODES = st.sampled_from(["worker", "shared"])
# Two stories with a common front: every length of either is a turn, a regeneration or a fork.
TOLD = ([*range(24)], [*range(6), *range(100, 118)])
STORIES = st.integers(0, 1)
LENGTHS = st.integers(1, 18)
MOST_WORKERS = 3


class Turn(NamedTuple):
    """What somebody parks. who: tenant and conversation.  story, length: the first so many tokens of TOLD.

    private: from which token on nothing is shared.  late: of sliding layers only what going on takes is held.
    """

    who: ConversationId
    story: int
    length: int
    level: AskedLevel = "host"
    private: int | None = None
    late: bool = False

    @property
    def tokens(self) -> list[int]:
        """All of it."""
        return TOLD[self.story][: self.length]

    def asked(self, geometry: Geometry) -> dict[str, Any]:
        """The other arguments of CoreRig.park."""
        held = [0] * len(geometry.groups)
        if self.late and len(held) > 1:
            held[1] = geometry.groups[1].needed_from(self.length)
        return {
            "tenant": self.who[0], "level": self.level, "private_from": self.private, "held_from": held,
        }  # fmt: skip


def turns(levels: st.SearchStrategy[AskedLevel] = LEVELS) -> st.SearchStrategy[Turn]:
    """Any."""
    return st.builds(Turn, NAMES, STORIES, LENGTHS, levels, PRIVATE, st.booleans())


class NodeRules(RuleBasedStateMachine):
    """See the module's text.

    promises: of level 'disk'.  forgotten: conversations that were not parked again since, each with the
    request for it; None for one that a node before this answered.
    """

    @initialize(
        plain=st.booleans(),
        verify=st.booleans(),
        disk_units=st.sampled_from([None, 12, 4000, 4000]),
        arena_units=st.sampled_from([(14,), (40,), (10, 10)]),
        spill_above=st.sampled_from([0.3, 1.0]),
        mode=MODES,
        late=st.booleans(),
        eviction=st.sampled_from(["lru", "cost"]),
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
        eviction: str,
    ) -> None:
        self.geometry = PLAIN if plain else HYBRID
        self.verify = verify
        self.promises = Promises(evicts=disk_units == 12)
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
            eviction=eviction,
        )
        self._start_node(late)
        self.forgotten: dict[ConversationId, int | None] = {}
        self.plans: list[tuple[RigWorker, Planned, int, int]] = []
        self.promises.watch(self.rig)
        self.workers = [self.rig.attach(self.geometry, mode=mode)]

    def _start_node(self, late: bool) -> None:
        """The services of a node that begins; late: its disk comes some time after it."""
        self.rig.start_gpu()
        if self.rig.store is not None and not late:
            self.rig.start_disk()

    # -- conversations

    def _worker(self, pick: int) -> RigWorker:
        return self.workers[pick % len(self.workers)]

    def _park(self, worker: RigWorker, turn: Turn, **how: Any) -> None:
        self.forgotten.pop(turn.who, None)
        self.rig.park(worker, turn.who[1], turn.tokens, **turn.asked(self.geometry), **how)

    @rule(pick=PICK, turn=turns())
    def park(self, pick: int, turn: Turn) -> None:
        self._park(self._worker(pick), turn)

    @rule(pick=PICK, turn=turns())
    def park_all_the_way(self, pick: int, turn: Turn) -> None:
        self.park(pick, turn)
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
    def park_after(self, pick: int, more: int, level: AskedLevel, late: bool) -> None:
        worker, planned, story, _ = self.plans[pick % len(self.plans)]
        if planned.front_tokens and worker in self.workers:
            who = (planned.plan.tenant, planned.plan.conversation)
            self._park(worker, Turn(who, story, planned.front_tokens + more, level, late=late), after=planned)

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
            self.promises.forget(who)
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
        self.promises.loose = True
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
        self.promises.check(whole)
        if late:
            self.rig = before.restarted(started=False)
            self.rig.violations += whole.violations
            self._start_node(late)
        self.promises.watch(self.rig)
        self.plans = []
        self.workers = [self.rig.attach(self.geometry, mode=mode)]
