"""Parks with copies at other nodes, in any order with all that may happen to nodes; and what always holds.

What a receipt of level 'copies=n' promises is held against the nodes that live: at once, and after each loss
of a node until n - 1 of them were lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtier.messages import cluster as c
from kvtier.messages.calls import Forget
from kvtier.node.blocks import ConversationId
from kvtier.node.coverage import restored_end
from kvtier.node.park_job import ParkJob
from kvtier.receipts import AskedLevel, Level
from kvtier.testing.node_rules import NAMES, PICK, Turn, turns
from kvtier.testing.rig_checks import drain, pieces_of, problems
from kvtier.testing.rig_cluster import NodeRig, RigCluster
from kvtier.testing.rig_uses import HYBRID, PLAIN, UNIT
from kvtier.testing.rig_world import DiskStore

# Two nodes share what may fail at once.
DOMAINS = {"a": "rack 1", "b": "rack 2", "d": "rack 2", "e": ""}
LEVELS: st.SearchStrategy[AskedLevel] = st.sampled_from(["copies=2", "copies=2", "copies=3", "host", "disk"])
FAILURES = st.sampled_from(["", "", "", "missing", "busy", "peer_lost", "deadline", "corrupt"])


@dataclass(slots=True)
class _Promise:
    """Tokens of a conversation that so many nodes have. lost: nodes that were lost since."""

    job: ParkJob = field(repr=False)
    tokens: tuple[int, ...]
    nodes: int
    lost: int


class CopiesMachine(RuleBasedStateMachine):
    """See the module's text. gone: drives of nodes that are lost.  began: losses until then, by a park's job.

    turns: the tokens of all parks of a conversation.
    """

    @initialize(plain=st.booleans(), disk=st.sampled_from([None, 1 << 20, 1 << 20]))
    def start(self, plain: bool, disk: int | None) -> None:
        self.geometry = PLAIN if plain else HYBRID
        self.cluster = RigCluster()
        self.gone: dict[str, tuple[DiskStore | None, tuple[c.Stone, ...]]] = {}
        self.promises: list[_Promise] = []
        self.turns: dict[ConversationId, list[tuple[int, ...]]] = {}
        self.forgotten: set[ConversationId] = set()
        self.began: dict[tuple[str, str], int] = {}
        self.losses = 0
        self.epoch = 1
        for name in DOMAINS:
            self._join(name, disk, ())
        self.cluster.announce()

    def _join(self, name: str, disk: DiskStore | int | None, graves: tuple[c.Stone, ...]) -> None:
        self.epoch += 1
        wishes = {"failure_domain": DOMAINS[name], "disk_expected": disk is not None}
        # Where no disk takes it, a copy may go for room: only memory that is never full keeps it.
        arena_bytes = ((64 if disk is not None else 4096) * UNIT,)
        rig = NodeRig(
            self.cluster, name, graves, epoch=self.epoch, disk=disk, wishes=wishes, arena_bytes=arena_bytes
        )
        rig.now_s = max(other.now_s for other in self.cluster.rigs.values())
        self._watch(rig)

    def _watch(self, rig: NodeRig) -> None:
        finish = rig.core._parks._finish

        def checked(job: ParkJob, level: Level) -> None:
            if level.startswith("copies"):
                self._promised(rig, job, int(level.removeprefix("copies=")))
            finish(job, level)

        rig.core._parks._finish = checked  # type: ignore[method-assign]
        finish_keep = rig.core.cluster.keeping._finish

        def kept(job: Any) -> None:
            if job.recorded and not job.failure:
                self._kept_on_disk(rig, job)
            finish_keep(job)

        rig.core.cluster.keeping._finish = kept  # type: ignore[method-assign]

    def _kept_on_disk(self, rig: NodeRig, job: Any) -> None:
        """After power loss the conversation ends at that node where it said so."""
        known = rig.restarted().core.state.conversations.get(job.name)
        if known is None or all(end.key != job.metas[-1].object_id.block_key for end in known.ends):
            rig.violations.append(f"{job.name} is said to be kept on disk and is not")

    def _promised(self, rig: NodeRig, job: ParkJob, nodes: int) -> None:
        tokens = rig.requests[job.message.request].pages.text.tokens
        lost = self.losses - self.began.get((rig.name, job.id), self.losses)
        # The copy of a turn that goes on from it, and was over there first, has taken its place.
        turns = [turn for turn in self.turns.get(job.name, ()) if turn[: len(tokens)] == tokens]
        holders = [name for turn in turns for name in self._holders(job, turn, len(tokens))]
        having = {DOMAINS[name] or name for name in holders}
        if len(having) + lost < nodes:
            rig.violations.append(f"{job.name} is said to be at {nodes} nodes and is at {having}")
        # A later turn that goes on from it may have begun before it was over.
        if all(turn == tokens for turn in turns) and self._has_heard(rig, job.name):
            self.promises.append(_Promise(job, tokens, nodes, lost))

    def _has_heard(self, rig: NodeRig, name: ConversationId) -> bool:
        """Whether the node knows of every forgetting of the name: if not, what it parks is forgotten too."""
        graves = [
            *(other.graves for other in self.cluster.rigs.values()),
            *(g for _, g in self.gone.values()),
        ]
        stones = {stone.id for some in graves for stone in some if (stone.tenant, stone.conversation) == name}
        return stones <= rig.core.cluster.burials.carried_out(name)

    def _holders(self, job: ParkJob, turn: tuple[int, ...], tokens: int) -> list[str]:
        """Nodes that restore so many tokens of a turn, or more, from what they have themselves."""
        rigs = self.cluster.rigs.items()
        return [name for name, rig in rigs if restored_end(pieces_of(rig, job, turn)) >= tokens]

    def _rig(self, pick: int) -> NodeRig:
        rigs = list(self.cluster.rigs.values())
        return rigs[pick % len(rigs)]

    # -- what happens

    @rule(pick=PICK, turn=turns(LEVELS))
    def park(self, pick: int, turn: Turn) -> None:
        rig, who, tokens = self._rig(pick), turn.who, tuple(turn.tokens)
        if rig.store is None:
            # A copy gives way to one with more rows of a window, which may then not come.
            turn = turn._replace(late=False)
        # A later turn takes the place of what it goes on from.
        self.promises = [
            promise
            for promise in self.promises
            if promise.job.name != who or promise.tokens != tokens[: len(promise.tokens)]
        ]
        self.forgotten.discard(who)
        self.turns.setdefault(who, []).append(tokens)
        worker = next((w for w in rig.workers if w.proc.connected), None) or rig.attach(self.geometry)
        park = rig.park(worker, who[1], tokens, timeout_s=20.0, **turn.asked(self.geometry))
        self.began[rig.name, park.job] = self.losses
        rig.run_copies()

    @rule(picks=st.lists(st.tuples(PICK, PICK, FAILURES), min_size=1, max_size=4))
    def end_a_read(self, picks: list[tuple[int, int, str]]) -> None:
        for pick, which, failure in picks:
            reading = [rig for rig in self.cluster.rigs.values() if rig.pulls]
            if not reading:
                return
            rig = reading[pick % len(reading)]
            pull = rig.pulls[which % len(rig.pulls)]
            if failure == "corrupt":
                rig.finish_pull(pull, flip=True)
            else:
                rig.finish_pull(pull, failure)

    @rule(pick=PICK)
    def run_a_node(self, pick: int) -> None:
        self._rig(pick).run()

    @rule(seconds=st.sampled_from([0.0, 0.6, 0.6, 3.0, 11.0, 25.0]), announce=st.booleans())
    def pass_time(self, seconds: float, announce: bool) -> None:
        for rig in list(self.cluster.rigs.values()):
            rig.tick(seconds)
        if announce:
            self.cluster.announce()

    @rule(pick=PICK, who=NAMES)
    def forget(self, pick: int, who: tuple[str, str]) -> None:
        if not any(rig.core.state.conversations.get(who) for rig in self.cluster.rigs.values()):
            return
        self.forgotten.add(who)
        rig = self._rig(pick)
        rig.ask(Forget(conversation=who[1], tenant=who[0]))
        rig.run()
        # Also what was said while the others were told of it.
        self.promises = [promise for promise in self.promises if promise.job.name != who]

    @rule(pick=PICK, seldom=st.integers(0, 2))
    def cut(self, pick: int, seldom: int) -> None:
        name = self._rig(pick).name
        if name in self.cluster.cut or seldom:
            self.cluster.cut.discard(name)
        else:
            self.cluster.cut.add(name)

    @precondition(lambda self: len(self.cluster.rigs) > 2)
    @rule(pick=PICK, seldom=st.integers(0, 2))
    def lose_a_node(self, pick: int, seldom: int) -> None:
        if seldom:
            return
        rig = self._rig(pick)
        # What it had said wrong stays said.
        assert not rig.violations, "\n".join(rig.violations)
        self.losses += 1
        for promise in self.promises:
            promise.lost += 1
        self.gone[rig.name] = (self.cluster.lose(rig.name), tuple(rig.graves))
        self.cluster.cut.add(rig.name)

    @precondition(lambda self: self.gone)
    @rule(pick=PICK)
    def come_back(self, pick: int) -> None:
        name = sorted(self.gone)[pick % len(self.gone)]
        store, graves = self.gone.pop(name)
        self.cluster.cut.discard(name)
        self._join(name, store, graves)

    # -- what always holds

    @invariant()
    def what_was_promised_is_there(self) -> None:
        if not hasattr(self, "cluster"):
            return
        for rig in self.cluster.rigs.values():
            assert not rig.violations, "\n".join(rig.violations)
        for promise in self.promises:
            if promise.lost < promise.nodes:
                tokens = promise.tokens
                assert self._holders(promise.job, tokens, len(tokens)), f"{promise} is at no node any more"

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        while self.gone:
            self.come_back(0)
        self.cluster.cut.clear()
        for _ in range(3):
            for rig in list(self.cluster.rigs.values()):
                drain(rig)
                # As a daemon does that has nothing to say: what it is to forget comes with the answer.
                rig.announcer.senders[0].probe()
            self.cluster.announce()
        for name, rig in self.cluster.rigs.items():
            wrong = problems(rig)
            assert not wrong, f"at '{name}': {wrong}"
            assert not rig.core.cluster.keeping._jobs
            assert not rig.core.cluster.replicas._wishes and not rig.core.cluster.replicas._asked
            back = self.forgotten & rig.core.state.conversations.keys()
            assert not back, f"'{name}' has {back}, which were forgotten"
