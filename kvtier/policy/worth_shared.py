"""Fronts that several conversations use, such as a system prompt: how often, by all of them together.

What one conversation alone uses is worth what its return is worth. A front is worth the sum over its users,
those yet to come included, and that sum is counted: uses are taken for a Poisson process whose rate is not
known. With a gamma prior, after n uses in a span B the next one is longer away than t with the chance
(B / (B + t))^n, and the best rate of return at age t is its hazard n / (B + t), since that only falls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from kvtier.policy.returns import Curve
from kvtier.policy.survival import EDGES_S
from kvtier.policy.usage import ParkedBlock
from kvtier.policy.worth_runs import Book, Run

# Added to the span: two uses at once are no proof of thousands.
_SPAN_S: Final = 60.0
# From so many uses on, the older half of them is forgotten.
_MOST_USES: Final = 16


def curve_of_uses(uses: int, span_s: float) -> Curve:
    """Of the wait for the next use, after so many in span_s."""
    longest_s = span_s + _SPAN_S + EDGES_S
    return Curve(
        lambda: ((longest_s[0] / longest_s) ** uses).astype(np.float32),
        lambda: (uses / longest_s).astype(np.float32),
    )


class SharedFronts:
    """Splits what a conversation parks into its own and what others use too."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def take(self, chain: Iterable[ParkedBlock], run: Run, left: Run, now_s: float) -> list[Run]:
        """What of the chain is stored belongs to `run`, unless another conversation uses it.

        left: the conversation's run before.  Answers the runs of shared blocks; each counts one use more.
        """
        book = self._book
        nobody, name = book.nobody, run.name
        foreign: dict[Run, list[ParkedBlock]] = {}
        known, upto = book.blocks.get, 0
        host_leaves, disk_leaves = left.leaves
        for parked in chain:
            block = known(parked.key)
            if block is None:
                continue
            before = block.run
            if before is left and block.held and block not in host_leaves and block not in disk_leaves:
                # Mostly: an inner block goes on with its conversation, and no order has to hear of it.
                block.run, upto = run, parked.end
            elif before is left or before is nobody or before.name == name:
                book.own(block, run, parked.end)
            else:
                foreign.setdefault(before, []).append(parked)
        book.shortened(left, upto)
        return [self._used(before, blocks, run, now_s) for before, blocks in foreign.items()]

    def foreign(self, key: bytes, run: Run) -> bool:
        """Whether a block is another conversation's, or shared already."""
        owner = self._book.owner(key)
        return owner is not self._book.nobody and owner.name != run.name

    def _used(self, before: Run, blocks: list[ParkedBlock], run: Run, now_s: float) -> Run:
        shared, end = before, blocks[-1].end
        run.start = max(run.start, end)
        if not before.uses or end < before.end:
            since_s = before.since_s if before.uses else before.used_s
            shared = Run(
                ("", ""), now_s, run.model, start=blocks[0].start, end=end, token_bytes=run.token_bytes
            )
            shared.uses, shared.since_s = before.uses, min(since_s, now_s)
            self._book.measured(shared)
            for parked in blocks:
                self._book.own(self._book.blocks[parked.key], shared, parked.end)
        shared.uses += 1
        if shared.uses > _MOST_USES:
            shared.uses //= 2
            shared.since_s = (shared.since_s + now_s) / 2
        shared.curve = curve_of_uses(shared.uses, now_s - shared.since_s)
        shared.clock_s, shared.used_s, shared.waiting = now_s, now_s, True
        self._book.ranked(shared)
        return shared
