"""Restores that are parts of one plan: their receipts come together, and say the same.

A rank that finds all of its own part in place waits for the others; one that dies, or does not come, ends the
wait of all, at the latest at the first deadline among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvtier.node.plans import Plans
from kvtier.node.restore_ends import RestoreEnds
from kvtier.node.restore_job import RestoreJob
from kvtier.receipts import RestoreReceipt


class RestoreActs:
    """See the module's text. A restore without other ranks is an act of its own."""

    def __init__(self, plans: Plans, ends: RestoreEnds) -> None:
        self._plans = plans
        self._ends = ends
        self._jobs: dict[str, list[RestoreJob]] = {}

    def began(self, job: RestoreJob) -> None:
        """A rank has taken its part."""
        if job.held.shared is not None:
            self._jobs.setdefault(job.held.shared.plan_id, []).append(job)

    def deadline_s(self, job: RestoreJob) -> float:
        """When all that belongs to it is cut off."""
        return min(one.deadline_s for one in self._fellows(job))

    def lost(self, job: RestoreJob) -> str:
        """Why the whole cannot come any more; '' while it can."""
        return job.held.shared.lost if job.held.shared is not None else ""

    def lose(self, job: RestoreJob, why: str) -> None:
        """The whole cannot come any more: nobody may take what is left of it."""
        shared = job.held.shared
        if shared is not None:
            shared.lost = shared.lost or why
            self._plans.drop(shared.plan_id)

    def late(self, job: RestoreJob) -> None:
        """The time of its act is over: who has not come by now does not count on it."""
        shared = job.held.shared
        if shared is not None and shared.left:
            self.lose(job, f"no rank with {', '.join(sorted(set(shared.left.values())))} came in time")

    def receipts(self, job: RestoreJob) -> list[tuple[RestoreJob, RestoreReceipt]]:
        """Those that may go out now that this one has ended: all of its act, or none."""
        jobs, shared = self._fellows(job), job.held.shared
        if shared is not None and (shared.left or not all(one.ended for one in jobs)):
            return []
        if shared is not None:
            del self._jobs[shared.plan_id]
        tokens = 0 if self.lost(job) else self._common(jobs)
        found = [(one, self._receipt(one, tokens, jobs)) for one in jobs]
        self._ends.note(_whole([receipt for _, receipt in found]))
        # The last one to end says how long the whole took; one that fell short, why.
        telling = next((one for one in jobs if one.reason), job)
        self._ends.learn(telling, sum(one.copied_bytes for one in jobs))
        return found

    def _fellows(self, job: RestoreJob) -> list[RestoreJob]:
        shared = job.held.shared
        return self._jobs[shared.plan_id] if shared is not None else [job]

    def _common(self, jobs: Sequence[RestoreJob]) -> int:
        """The most tokens to which every one of them has all that is needed."""
        tokens = jobs[0].held.plan.load_tokens
        while tokens:
            reached = {self._ends.in_place(one, tokens) for one in jobs}
            if reached == {tokens} or len(jobs) == 1:
                return min(reached)
            tokens = min(min(reached), tokens - 1)
        return 0

    def _receipt(self, job: RestoreJob, tokens: int, jobs: Sequence[RestoreJob]) -> RestoreReceipt:
        receipt = self._ends.receipt(job, tokens)
        if job.reason or tokens >= job.held.plan.load_tokens:
            return receipt
        if self.lost(job):
            return replace(receipt, reason="shard_missing", detail=self.lost(job))
        short = next((one for one in jobs if one.reason), job)
        return replace(receipt, reason=short.reason, detail=f"{short.worker.shard}: {short.detail}")


def _whole(receipts: Sequence[RestoreReceipt]) -> RestoreReceipt:
    """What all of them together have brought."""
    return replace(
        receipts[0],
        bytes=sum(receipt.bytes for receipt in receipts),
        seconds=max(receipt.seconds for receipt in receipts),
    )
