"""Ranks of one model among all other troubles of a node: they come late, die, stop, and come back.

Beside what always holds of a node: what a park says holds of every slice, a plan reaches no further than the
slice that is there least, and all restores of one plan say the same.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis.stateful import invariant, precondition, rule

from kvtier.messages.calls import JoinPlan, Mode, Planned
from kvtier.node.coverage import longest, restored_end
from kvtier.node.held_plan import HeldPlan
from kvtier.receipts import AskedLevel
from kvtier.testing.core_rig import CoreRig
from kvtier.testing.node_machine import NodeMachine
from kvtier.testing.node_rules import LENGTHS, LEVELS, NAMES, PICK, STORIES, TOLD, Turn, turns
from kvtier.testing.rig_uses import HYBRID, RigRestore, RigWorker

# With two equal slices where the geometry has several groups.
_RANKS = (["r0", "r1"], ["r0", "r1", "r1"])
_MODEL = b"ranks of one model, 32 bytes ...."[:32]
# Which of them come.
WHO = st.sampled_from(["all", "all", "all", "the others later", "first", "last"])


class RankMachine(NodeMachine):
    """See the module's text. acts: the restores of each plan."""

    _whose: CoreRig | None = None

    def _ranks(self, pick: int = 0) -> list[RigWorker]:
        """The ranks; those that died come back, but for one time in four."""
        names = _RANKS[self.geometry is HYBRID]
        if self._whose is not self.rig:
            self._whose, self._living = self.rig, [self._attach_rank(name) for name in names]
            _watch_plans(self.rig)
            self.acts: dict[str, list[RigRestore]] = {}
            self.shared: list[tuple[Planned, int, int]] = []
            self.told: list[tuple[tuple[str, str], int, int]] = []
        for index, rank in enumerate(self._living):
            if not (rank.proc.alive and rank.proc.connected) and pick % 4:
                self._living[index] = self._attach_rank(names[index])
        return self._living

    def _attach_rank(self, shard: str) -> RigWorker:
        ranks = _RANKS[self.geometry is HYBRID]
        mode: Mode = "shared" if self.verify else "worker"
        return self.rig.attach(self.geometry, fingerprint=_MODEL, shard=shard, mode=mode, ranks=ranks)

    def _coming(self, pick: int, who: str) -> list[RigWorker]:
        ranks = self._ranks(pick)
        ranks = ranks[::-1] if pick % 2 else list(ranks)
        return {"first": ranks[:1], "last": ranks[-1:]}.get(who, ranks)

    # -- rules

    @rule(pick=PICK, turn=turns(), others=LEVELS, coming=WHO)
    def park_ranks(self, pick: int, turn: Turn, others: AskedLevel, coming: str) -> None:
        """others: the level that all but the first rank ask for."""
        coming_ranks = self._coming(pick, coming)
        self.told.append((turn.who, turn.story, turn.length))
        for index, rank in enumerate(coming_ranks):
            if index and coming == "the others later":
                self.rig.run()
            if rank.proc.alive and rank.proc.connected:
                own = turn._replace(level=others) if index else turn
                self._park(rank, own, timeout_s=(30.0, 5.0)[pick % 2])

    @rule(pick=PICK, who=NAMES, story=STORIES, length=LENGTHS, level=LEVELS, others=LEVELS)
    def park_ranks_all_the_way(
        self, pick: int, who: tuple[str, str], story: int, length: int, level: AskedLevel, others: AskedLevel
    ) -> None:
        self.park_ranks(pick, Turn(who, story, length, level), others, "all")
        self.rig.run()

    @rule(pick=PICK, who=NAMES, story=STORIES, length=LENGTHS)
    def plan_ranks(self, pick: int, who: tuple[str, str], story: int, length: int) -> None:
        (tenant, name), tokens = who, TOLD[story][:length]
        ranks = self._ranks(pick)
        rank = ranks[pick % len(ranks)]
        if not (rank.proc.alive and rank.proc.connected):
            return
        planned = self.rig.plan(rank, name, tokens, tenant=tenant)
        if not isinstance(planned, Planned) or not planned.plan.plan_id:
            return
        self.shared.append((planned, story, length))

    @precondition(lambda self: self._whose is self.rig and self.shared)
    @rule(pick=PICK, deadline_s=st.sampled_from([0.5, 20.0]), coming=WHO)
    def restore_ranks(self, pick: int, deadline_s: float, coming: str) -> None:
        planned, story, length = self.shared[pick % len(self.shared)]
        for index, rank in enumerate(self._coming(pick, coming)):
            if index and coming == "the others later":
                self.rig.run()
            if not (rank.proc.alive and rank.proc.connected):
                continue
            joined = self.rig.ask(JoinPlan(worker=rank.name, plan_id=planned.plan.plan_id), rank.peer)
            if joined.plan.plan_id:
                use = self.rig.restore(rank, joined, TOLD[story][:length], deadline_s=deadline_s)
                self.acts.setdefault(planned.plan.plan_id, []).append(use)

    @rule(
        pick=PICK, who=NAMES, story=STORIES, length=LENGTHS, level=LEVELS, others=LEVELS, coming=WHO,
        short=st.sampled_from([False, False, True]),
    )  # fmt: skip
    def a_turn_of_ranks(
        self,
        pick: int,
        who: tuple[str, str],
        story: int,
        length: int,
        level: AskedLevel,
        others: AskedLevel,
        coming: str,
        short: bool,
    ) -> None:
        """They park, and restore what they have parked."""
        self.park_ranks_all_the_way(pick, who, story, length, level, others)
        self.resume_ranks(0, pick % 4, coming, short)

    @precondition(lambda self: self._whose is self.rig and self.told)
    @rule(pick=PICK, more=st.integers(0, 3), coming=WHO, short=st.sampled_from([False, False, True]))
    def resume_ranks(self, pick: int, more: int, coming: str, short: bool) -> None:
        """What was parked is restored at once; short: but for what one copy was to bring."""
        before = len(self.shared)
        who, story, length = self.told[-1 - pick % min(len(self.told), 3)]
        self.plan_ranks(pick, who, story, length + more)
        if len(self.shared) > before:
            self.restore_ranks(len(self.shared) - 1, 20.0, coming)
            copies = [op for op in self.rig.copies() if not op.executor.stopped]
            if short and copies:
                self.rig.finish(copies[-1], "error: of the device")
            self.rig.run()

    @precondition(lambda self: self._whose is self.rig)
    @rule(pick=PICK, how=st.sampled_from(["kill", "disconnect", "stop", "stop"]))
    def trouble_with_ranks(self, pick: int, how: str) -> None:
        rank = self._living[pick % len(self._living)]
        if how == "stop":
            rank.proc.stopped = not rank.proc.stopped
        elif not (rank.proc.alive and rank.proc.connected):
            return
        elif how == "kill":
            self.rig.kill(rank.proc, socket_first=bool(pick % 2))
        else:
            self.rig.disconnect(rank.proc)

    # -- what always holds

    @invariant()
    def ranks_agree(self) -> None:
        if self._whose is None or self._whose is not self.rig:
            return
        for plan_id, uses in self.acts.items():
            said = {receipt.tokens for use in uses for receipt in use.receipts}
            assert len(said) <= 1, f"the ranks were told {said} of plan {plan_id}"
            alone = any(said) and len(uses) < len(self._living)
            assert not alone, f"{said} tokens are said to be there of plan {plan_id}, for {len(uses)} ranks"


def _watch_plans(rig: CoreRig) -> None:
    """Hold each plan of ranks to what each slice alone could be restored from, at the moment it is made."""
    plans, state = rig.core._plans, rig.core.state
    hold = plans._hold

    def checked(held: HeldPlan) -> None:
        end = held.plan.load_tokens
        for shard in held.worker.ranks:
            found = longest(held.blocks, held.geometry, shard, state.source_of, end)
            if restored_end(found) < end:
                rig.violations.append(f"a plan of {end} tokens, of which {shard} has {restored_end(found)}")
        hold(held)

    plans._hold = checked  # type: ignore[method-assign]
