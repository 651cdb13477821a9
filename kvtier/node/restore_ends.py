"""The end of a restore: what is in place, what it took, and what the node learns from that."""

from __future__ import annotations

from kvtier.node.blocks import Stored
from kvtier.node.counters import count
from kvtier.node.coverage import Source, longest, restored_end
from kvtier.node.restore_job import RestoreJob
from kvtier.node.state import NodeState
from kvtier.receipts import RestoreReceipt

_PAGE_BYTES = 4


class RestoreEnds:
    """Makes receipts of restores, and takes them into account."""

    def __init__(self, state: NodeState) -> None:
        self._state = state

    def receipt(self, job: RestoreJob, tokens: int) -> RestoreReceipt:
        """That of `tokens` everything is in place."""
        plan = job.held.plan
        sources: dict[str, int] = {}
        for part in plan.ranges:
            if part.source != "compute" and part.start < tokens:
                sources[part.source] = sources.get(part.source, 0) + min(part.end, tokens) - part.start
        return RestoreReceipt(
            conversation=plan.conversation,
            tenant=plan.tenant,
            tokens=tokens,
            requested_tokens=plan.load_tokens,
            sources=sources,
            bytes=job.copied_bytes,
            seconds=self._state.now_s - job.started_s,
            reason=job.reason,
            detail=job.detail,
            busy=self._busy(job),
            loaded_from=plan.load_from if tokens else 0,
            read_s=job.read_s,
            copy_s=job.copy_s,
        )

    def note(self, receipt: RestoreReceipt) -> None:
        """Count it."""
        counters = self._state.counters
        for source in receipt.sources:
            count(counters.restores, source)
        if receipt.reason:
            count(counters.misses, receipt.reason)
        counters.restored_bytes += receipt.bytes
        counters.restored_tokens += receipt.tokens
        counters.restore_s.add(receipt.seconds)

    def learn(self, job: RestoreJob, copied_bytes: int) -> None:
        """What took how long. Of what was cut off, that it takes longer than it had.

        copied_bytes: by all ranks of the plan.
        """
        now_s, held = self._state.now_s, job.held
        restore, choice, asked = self._state.policies.restore, held.chosen.choice, held.chosen.asked
        seconds = now_s - job.started_s
        if job.tried_again or seconds <= 0 or job.reason not in ("", "deadline"):
            return
        if not job.reason:
            for path in asked:
                took_s = job.arrived_s.get(path.source, now_s) - job.started_s
                restore.observed(path.source, path.nbytes, took_s, path.queue_bytes, path.via)
        elif len(asked) == 1 and copied_bytes:
            path = asked[0]
            restore.observed(path.source, copied_bytes, seconds, path.queue_bytes, path.via)
        if not job.reason or seconds > choice.eta_high_s:
            restore.restored(choice, seconds)
            slow = next((path.source for path in asked if path.source != "host"), "host")
            eta_s = choice.eta_low_s, choice.eta_mid_s, choice.eta_high_s
            self._state.counters.eta.see(slow, eta_s, seconds)

    def in_place(self, job: RestoreJob, at_most: int) -> int:
        """Up to where all that is needed of the first `at_most` tokens is there; 0 while copies run."""
        held, computed = job.held, job.held.plan.load_from
        if job.running:
            return 0

        def where(stored: Stored) -> Source | None:
            there = stored.meta.start < computed or stored.meta.object_id in job.copied
            return "host" if there else None

        tokens = restored_end(longest(held.blocks, held.geometry, held.shard, where, at_most))
        return tokens if tokens > computed else 0

    def _busy(self, job: RestoreJob) -> tuple[int, ...]:
        """Pages that copies in another process may still write to."""
        if not job.running or job.worker.mode == "worker":
            return ()
        return tuple(
            int.from_bytes(packed[at : at + _PAGE_BYTES], "little")
            for packed in job.pages
            for at in range(0, len(packed), _PAGE_BYTES)
        )
