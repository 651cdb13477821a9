"""Parks of the same tokens by the ranks of one model: one act, with one end and one level.

Each rank's pages are free as soon as its own part is gathered.  The conversation's new end, its record on
disk and the receipts wait until every slice is there: what was promised of the turn before stands until then.
Whose part is stored already need not come.  Where one cannot come any more, all are told.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.node.blocks import ConversationId, Private, Stored
from kvtier.node.coverage import longest, restored_end
from kvtier.node.park_job import ParkAct, ParkJob
from kvtier.node.ranks import slices_of
from kvtier.node.state import NodeState
from kvtier.receipts import LEVELS, Level


class ParkActs:
    """See the module's text. A park of a worker without ranks has no act."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._acts: dict[tuple[ConversationId, tuple[str, ...], bytes], ParkAct] = {}
        self._changed = False

    def take_changed(self) -> bool:
        """Whether some act has become whole, or was lost, since the last time."""
        changed, self._changed = self._changed, False
        return changed

    def privates(self, name: ConversationId) -> list[Private]:
        """How ranks that came before have keyed what they share with nobody."""
        acts = [act for (whose, _, _), act in self._acts.items() if whose == name]
        return [job.private for act in acts for job in act.jobs if job.private is not None]

    def join(self, job: ParkJob) -> None:
        """A rank begins to park."""
        ranks = job.worker.ranks
        if not ranks:
            return
        key = (job.name, ranks, job.metas[-1].object_id.block_key)
        act = self._acts.get(key)
        if act is None or act.lost:
            # Whoever tries again does not end with those who still stop.
            slices = tuple(dict.fromkeys(ranks))
            act = self._acts[key] = ParkAct(self._state.next_id("a"), key, slices)
        act.jobs.append(job)
        job.act = act

    def missing(self, job: ParkJob) -> list[str]:
        """Slices that nobody has brought yet."""
        act = job.act
        if act is None or act.whole:
            return []
        there = act.covered | {one.worker.shard for one in act.jobs if one.ready}
        return [shard for shard in act.slices if shard not in there]

    def ready(self, job: ParkJob) -> None:
        """All of the rank's own part is there. What nobody has brought may be stored already."""
        act = job.act
        if act is None or act.whole:
            return
        for shard in self.missing(job):
            found = self._stored(job, shard)
            if not found:
                return
            self._hold(act, found, job)
            act.covered.add(shard)
        act.whole = self._changed = True

    def agreed(self, job: ParkJob, level: Level) -> list[tuple[ParkJob, Level]]:
        """Whose receipts may go out now that this job will get no further than `level`: all, or none."""
        act = job.act
        if act is None or job.failure is not None:
            return [(job, level)]
        act.reached[job.id] = level
        fellows = [one for one in act.jobs if one.ready and one.message.level == job.message.level]
        if any(one.id not in act.reached for one in fellows):
            return []
        levels = [act.reached[one.id] for one in fellows]
        least = min(levels, key=LEVELS.index)
        why = fellows[levels.index(least)].lowered
        for one in fellows:
            one.lowered = one.lowered or why
        act.over = len(fellows) == len(act.jobs)
        return [(one, least) for one in fellows]

    def left(self, job: ParkJob) -> None:
        """The job is over; what it held stays held while others of its act go on."""
        act = job.act
        if act is None:
            return
        act.jobs.remove(job)
        act.reached.pop(job.id, None)
        if not act.jobs:
            self._end(act)
        elif job.ready and (job.failure is None or job.failure[0] != "shard_missing"):
            if not act.over:
                self._hold(act, job.held.values(), job)
                act.covered.add(job.worker.shard)
                # Who is to bring everything to disk has this on his hands now.
                self._changed = True
        elif not act.whole and job.worker.shard not in act.covered and not act.lost:
            others = {one.worker.shard for one in act.jobs if one.ready or one.failure is None}
            if job.ready or job.worker.shard not in others:
                reason, detail = job.failure or ("", "")
                act.lost = f"the part of {job.worker.shard} is not there: {reason}, {detail}"
                for one in act.jobs:
                    one.retry_after_s = job.retry_after_s
                self._changed = True

    def _stored(self, job: ParkJob, shard: str) -> list[Stored]:
        """All that a restore needs of another slice, or nothing."""
        state = self._state
        chain = state.tree.chain(job.metas[-1].object_id.block_key)
        geometry = slices_of(state, job.worker, job.root.fidelity).get(shard)
        if geometry is None or not chain or all(whose != shard for _, whose in chain[-1].parts):
            return []
        pieces = longest(chain, geometry, shard, state.source_of, job.query.end)
        return [piece.stored for piece in pieces] if restored_end(pieces) == job.query.end else []

    def _hold(self, act: ParkAct, objects: Iterable[Stored], job: ParkJob) -> None:
        for stored in objects:
            stored.pins += 1
            act.others.append(stored)
            slot = self._state.host.find(stored.meta.object_id)
            if slot is not None:
                self._state.host.lease(slot, act.id, job.started_s + 2 * job.message.timeout_s)

    def _end(self, act: ParkAct) -> None:
        if self._acts.get(act.key) is act:
            del self._acts[act.key]
        for stored in act.others:
            stored.pins -= 1
        act.others.clear()
        self._state.host.holder_ended(act.id)
