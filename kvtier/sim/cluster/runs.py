"""Chain segments: blocks that came together and stay in equal state, the unit that is kept or dropped."""

from __future__ import annotations

from array import array
from typing import Final

from kvtier.policy.usage import ParkedBlock
from kvtier.sim.workload.turns import Turn

# A long prompt is several runs, so that it can be kept in part.
RUN_TOKENS: Final = 8192


class Run:
    """Tokens [start, end) on a parent. Where it lies is for each store to know, by `number`.

    parked: as the policies are told of it; made once, since every later turn tells of it again.
    """

    __slots__ = ("end", "key", "nbytes", "number", "parent", "parked", "start", "tenant")

    def __init__(
        self, number: int, parent: Run | None, start: int, end: int, token_bytes: float, tenant: int
    ) -> None:
        self.number, self.parent, self.tenant = number, parent, tenant
        self.start, self.end = start, end
        self.nbytes = int((end - start) * token_bytes)
        self.key = number.to_bytes(8, "big")
        self.parked = ParkedBlock(self.key, start, end, self.nbytes)

    @property
    def parent_key(self) -> bytes:
        """The parent's key, or 8 zero bytes; runs count from 1."""
        return self.parent.key if self.parent is not None else bytes(8)


class Chains:
    """The runs of all rows so far: identities, which exist from a row's arrival on."""

    def __init__(self, block_tokens: int, token_bytes: float) -> None:
        self._block_tokens, self._token_bytes = block_tokens, token_bytes
        self._ends: list[Run | None] = []
        self._count = 0

    def add(self, turn: Turn) -> tuple[Run | None, Run | None, int]:
        """(The run that ends the known front, the run that ends this row, known tokens in full blocks).

        The front may end inside of its last run.
        """
        shared = min(turn.shared_tokens, turn.tokens_in)
        front = self._ends[turn.ref] if turn.ref >= 0 else None
        while front is not None and front.start >= shared:
            front = front.parent
        known = min(front.end, shared) // self._block_tokens * self._block_tokens if front is not None else 0
        end = (turn.tokens_in + turn.tokens_out) // self._block_tokens * self._block_tokens
        last, at = front, known
        while at < end:
            stop = min(at + RUN_TOKENS, end)
            self._count += 1
            last = Run(self._count, last, at, stop, self._token_bytes, turn.tenant)
            at = stop
        self._ends.append(last)
        return front, last, known


class Rows:
    """What is kept of each row for those that refer to it.

    node: where it was served, -1 not yet; ended_s: end of service, -1 not yet; planned_end_s: as the load has
    it, -1 unknown.
    """

    def __init__(self) -> None:
        self.node = array("i")
        self.conversation = array("q")
        self.ended_s = array("d")
        self.planned_end_s = array("d")

    def add(self, turn: Turn) -> int:
        """Take in the next row; answers its number."""
        self.node.append(-1)
        self.conversation.append(turn.conversation)
        self.ended_s.append(-1.0)
        self.planned_end_s.append(turn.t_s + turn.service_s if turn.service_s >= 0 else -1.0)
        return len(self.node) - 1
