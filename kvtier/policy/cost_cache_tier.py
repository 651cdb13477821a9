"""What one tier of the cost policy holds: pieces of chains, cut from their ends by worth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.flat import NONE, BlockTable, front_kernel, grown
from kvtier.policy.baselines.gdsf import COST_DOUBLES_AT_TOKENS
from kvtier.policy.baselines.interfaces import Arrival, IntArray, Jit
from kvtier.policy.baselines.lru import LruCache
from kvtier.policy.cost_cache_kernels import Blocks, Pieces, cost_kernels

# How much of the work asked for may be lost against LRU, and how many requests that is remembered over.
_PATIENCE = 0.002
_MEMORY = 1 - 1 / 10_000


def growth_of(block_tokens: int, by_cost: bool) -> float:
    """How much more a block saves than the one before it, as a part of what the first one saves."""
    return block_tokens / COST_DOUBLES_AT_TOKENS if by_cost else 0.0


class Paths(BlockTable):
    """Parents of blocks, and which row used each one last."""

    COLUMNS = {"owner": (np.int32, NONE)}  # noqa: RUF012
    owner: IntArray

    def __init__(self, jit: Jit) -> None:
        super().__init__(jit)
        self._owners = cost_kernels(jit).owners

    def owners(self, path: IntArray) -> tuple[IntArray, IntArray]:
        """Rows that used the known front of a path last, and the depths at which each one's run ends."""
        rows = np.empty(len(path), np.int32)
        ends = np.empty(len(path), np.int32)
        runs = self._owners(path, self.owner, rows, ends)
        return rows[:runs], ends[:runs]


class Tier:
    """A set of blocks that is closed under prefixes, and ordered by worth."""

    def __init__(self, capacity: int, growth: float, jit: Jit) -> None:
        self.capacity = capacity
        self.count = 0
        self.resident = np.zeros(0, np.bool_)
        self._growth = growth
        self._kernels = cost_kernels(jit)
        self._front = front_kernel(jit)
        self._children: IntArray = np.zeros(0, np.int32)
        self._none = np.zeros(0, np.bool_)
        self._tail: IntArray = np.zeros(0, np.int32)
        self._end: IntArray = np.zeros(0, np.int32)
        self._kept = np.zeros(1024, np.int32)
        self._kept_rows = 0

    def front(self, path: IntArray) -> int:
        """How many blocks of the path are resident, from the root without a gap."""
        return int(self._front(self.resident, path))

    def meet(self, paths: Paths, pieces: Pieces) -> None:
        """Make room in the arrays for all blocks and rows that are known."""
        blocks, rows = len(paths.owner), len(pieces.start)
        if blocks > len(self.resident):
            self.resident = grown(self.resident, blocks, 0)
            self._none = grown(self._none, blocks, 0)
            self._children = grown(self._children, blocks, 0)
        if rows > len(self._tail):
            self._tail, self._end = grown(self._tail, rows, 0), grown(self._end, rows, 0)

    def take(self, path: IntArray, row: int, paths: Paths) -> None:
        """Hold a whole path, as the last use of row."""
        self.count += self._kernels.take(path, row, self._blocks(paths))
        self._end[row], self._tail[row] = len(path), path[-1]
        if self._kept_rows == len(self._kept):
            self._kept = np.concatenate((self._kept, np.zeros_like(self._kept)))
        self._kept[self._kept_rows] = row
        self._kept_rows += 1

    def cut(
        self,
        over: int,
        now_s: float,
        by_age: bool,
        paths: Paths,
        pieces: Pieces,
        held: npt.NDArray[np.bool_] | None = None,
        unpaid: npt.NDArray[np.bool_] | None = None,
        write: float = 0.0,
    ) -> IntArray:
        """Evict `over` blocks, or as many as may go; in order.

        held: by block, what must stay.  unpaid: what stays by a write.  write: what that costs, as a part of
        what one use saves.
        """
        if over <= 0:
            return np.empty(0, np.int32)
        out = np.empty(over, np.int32)
        blocks = self._blocks(paths, held, unpaid)
        own = pieces._replace(tail=self._tail, end=self._end)
        args = (over, now_s, self._growth, by_age, write, self._kept, self._kept_rows)
        gone, self._kept_rows = self._kernels.cut(*args, blocks, own, out)
        self.count -= gone
        return out[:gone]

    def shed(self, named: IntArray, count: int, paths: Paths, pieces: Pieces) -> IntArray:
        """Evict up to `count` of the named blocks, in their order; those on which others stand stay."""
        out = np.empty(count, np.int32)
        blocks = self._blocks(paths)
        own = pieces._replace(tail=self._tail, end=self._end)
        gone = self._kernels.shed(named, count, blocks, own, out)
        self.count -= gone
        return out[:gone]

    def _blocks(
        self,
        paths: Paths,
        held: npt.NDArray[np.bool_] | None = None,
        unpaid: npt.NDArray[np.bool_] | None = None,
    ) -> Blocks:
        held = self._none if held is None else held
        unpaid = self._none if unpaid is None else unpaid
        return Blocks(self.resident, paths.parent, paths.owner, self._children, held, unpaid)


class Shadow:
    """LRU without data: what worth has to be better than."""

    def __init__(self, capacity: int, growth: float, jit: Jit) -> None:
        self._lru = LruCache(capacity, jit)
        self._growth = growth
        self._behind = 0.0
        self._asked = 0.0

    @property
    def leads(self) -> bool:
        """Worth has fallen behind, as it may while little is learned."""
        return self._behind > _PATIENCE * self._asked

    def serve(self, arrival: Arrival, hit: int) -> None:
        """A request, of which the policy itself had `hit` blocks."""
        lost = self._saving(self._lru.serve(arrival).hit) - self._saving(hit)
        self._behind = _MEMORY * self._behind + lost
        self._asked = _MEMORY * self._asked + self._saving(len(arrival.path))

    def trim(self, count: int) -> None:
        """Hold no more blocks than that."""
        self._lru.trim(count)

    def _saving(self, blocks: int) -> float:
        return blocks + self._growth * blocks * (blocks - 1) / 2
