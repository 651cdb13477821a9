"""Anything in any order at a node, sequences that chance seldom makes, and what always holds."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis.stateful import invariant, precondition, rule

from kvtier.messages.calls import Forget, Mode
from kvtier.messages.tiers import DiskRemove
from kvtier.testing.node_rules import LENGTHS, MODES, NAMES, PICK, STORIES, TOLD, NodeRules, Turn
from kvtier.testing.rig_checks import drain, problems
from kvtier.testing.rig_uses import HYBRID

SELDOM = st.integers(0, 1)


class NodeMachine(NodeRules):
    """See the module's text. Each of the sequences is one that a broken core cannot pass unseen."""

    # -- sequences

    @precondition(lambda self: self.rig.store is not None)
    @rule(pick=PICK, who=NAMES, mode=MODES, seldom=SELDOM)
    def forget_before_the_disk_is_there(
        self, pick: int, who: tuple[str, str], mode: Mode, seldom: int
    ) -> None:
        """Power loss, and a conversation is forgotten before the disk has said that it has it."""
        if seldom:
            return
        self.lose_everything(mode, 0, late=True)
        names = self.promises.names() or [who]
        self.wish(pick, names[pick % len(names)], "forget")
        if pick % 2:
            self._start_services()

    @precondition(lambda self: self.rig.disk is not None)
    @rule(pick=PICK, who=NAMES, story=STORIES, length=LENGTHS, seldom=SELDOM)
    def forget_what_is_being_written(
        self, pick: int, who: tuple[str, str], story: int, length: int, seldom: int
    ) -> None:
        """The answer to a removal arrives, that to the write before it is lost with the disk service."""
        if seldom:
            return
        # A spill writes objects and their name at once, a park the name last.
        self.park(pick, Turn(who, story, 9 + length // 2, "disk" if pick % 2 else "host"))
        self.rig.run_copies()
        self.wish(pick, who, "forget")
        for op in [op for op in self.rig.disk_ops() if isinstance(op.message, DiskRemove)]:
            self.rig.finish(op)
        self.trouble_with_services(pick, "lose answers")
        self._start_services()

    @precondition(lambda self: self.geometry is HYBRID and self.rig.disk is not None)
    @rule(pick=PICK, who=NAMES, story=STORIES, more=st.integers(0, 10), seldom=SELDOM)
    def park_more_rows_of_a_window(
        self, pick: int, who: tuple[str, str], story: int, more: int, seldom: int
    ) -> None:
        """What the disk has of a sliding layer is less than the next park of the same tokens has."""
        if seldom:
            return
        self.park_all_the_way(pick, Turn(who, story, 7 + more, "disk", late=True))
        self.park(pick, Turn(who, story, 7 + more, "disk"))
        self.rig.run_copies()

    @rule(pick=PICK, who=NAMES, story=STORIES, length=LENGTHS)
    def resume(self, pick: int, who: tuple[str, str], story: int, length: int) -> None:
        """All that is planned is restored at once."""
        before = len(self.plans)
        self.plan(pick, who, story, length)
        if len(self.plans) > before:
            self.restore(len(self.plans) - 1, 20.0)
            self.rig.run()

    @rule(pick=PICK, who=NAMES, story=STORIES, seldom=SELDOM)
    def crowd_out_a_plan(self, pick: int, who: tuple[str, str], story: int, seldom: int) -> None:
        """What a plan holds lies in host memory that others need."""
        if seldom:
            return
        self.plan(pick, who, story, len(TOLD[story]))
        for tenant, name in (("acme", "crowd"), ("rival", "crowd")):
            self.park_all_the_way(pick, Turn((tenant, name), 1 - story, 18))

    # -- what always holds

    @invariant()
    def nothing_wrong(self) -> None:
        if not hasattr(self, "rig"):
            return
        rig, state = self.rig, self.rig.core.state
        assert not rig.violations, "\n".join(rig.violations)
        assert state.conversations.keys().isdisjoint(self.forgotten), "what was forgotten came back"
        over = [name for name, known in state.conversations.items() if not known.heads]
        assert not over, f"{over} have no end left and are not over"
        held = [p for plan in rig.core._plans._held.values() for p in plan.pieces if p.source == "host"]
        holds = Counter(id(piece.stored) for piece in held)
        for block in state.tree:
            assert all(s.pins >= 0 and s.holds == holds[id(s)] for s in block.parts.values())
            assert all(s.slot == rig.host.find(s.meta.object_id) for s in block.parts.values())
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
        self.nothing_wrong()
        left = {name for block in rig.core.state.tree for name in block.names}
        for tenant, name in sorted(left):
            rig.ask(Forget(conversation=name, tenant=tenant))
        self._at_rest()
        assert rig.host.usage().used_bytes == 0
        assert len(rig.core.state.tree) == 0
        assert rig.store is None or not (rig.store.objects or rig.store.records)
