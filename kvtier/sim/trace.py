"""A recorded trace in memory: requests as columns, blocks as a forest."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtier.policy.baselines.interfaces import IntArray, Outcome
from kvtier.sim.chains import NONE, Chains
from kvtier.sim.compiled import compiled

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One request. leaf: its last block, NONE without blocks; blocks: how many full ones its prompt has.

    Times in seconds; conversation, turn and outcome.duration_s are -1 where unknown.  ref: the row that the
    trace names as the one whose front it has, or -1.
    """

    t_s: float
    conversation: int
    turn: int
    tokens_in: int
    kind: str
    outcome: Outcome
    leaf: int
    blocks: int
    tenant: int = 0
    ref: int = -1


@dataclass(frozen=True, slots=True)
class Trace:
    """All requests in order of time. parent: int32 by block, NONE for a root; leaf, blocks: int32 by row."""

    name: str
    block_tokens: int
    t_s: FloatArray
    conversation: npt.NDArray[np.int64]
    turn: npt.NDArray[np.int64]
    tokens_in: npt.NDArray[np.int64]
    tokens_out: npt.NDArray[np.int64]
    duration_s: FloatArray
    kind: tuple[str, ...]
    stop: tuple[str, ...]
    leaf: IntArray
    blocks: IntArray
    parent: IntArray
    tenant: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.leaf)

    @property
    def unique_blocks(self) -> int:
        """How many different blocks there are."""
        return len(self.parent)

    def path(self, row: int) -> IntArray:
        """The blocks of a row, int32, the root first."""
        path = np.empty(self.blocks[row], np.int32)
        _fill_path(self.parent, self.leaf[row], path)
        return path

    def outcome(self, row: int) -> Outcome:
        """What is known of a row once it is served."""
        return Outcome(int(self.tokens_out[row]), self.stop[row], float(self.duration_s[row]))


class TraceBuilder:
    """Collects rows; values are checked by the readers."""

    def __init__(self) -> None:
        self.chains = Chains()
        self._t_s = array("d")
        self._duration_s = array("d")
        self._numbers = {
            name: array("q") for name in ("conversation", "turn", "tokens_in", "tokens_out", "tenant")
        }
        self._kind: list[str] = []
        self._stop: list[str] = []
        self.leaf = array("i")
        self.blocks = array("i")

    def __len__(self) -> int:
        return len(self.leaf)

    def add(self, row: Row) -> None:
        """Take in the next row."""
        self._t_s.append(row.t_s)
        self._duration_s.append(row.outcome.duration_s)
        for name in ("conversation", "turn", "tokens_in", "tenant"):
            self._numbers[name].append(getattr(row, name))
        self._numbers["tokens_out"].append(row.outcome.tokens_out)
        self._kind.append(row.kind)
        self._stop.append(row.outcome.stop)
        self.leaf.append(row.leaf)
        self.blocks.append(row.blocks)

    def build(self, name: str, block_tokens: int) -> Trace:
        """The trace of all rows so far."""
        parent = np.arange(-1, self.chains.blocks - 1, dtype=np.int32)
        first, on = self.chains.runs()
        parent[np.array(first, np.int32)] = np.array(on, np.int32)
        return Trace(
            name=name,
            block_tokens=block_tokens,
            t_s=np.array(self._t_s),
            duration_s=np.array(self._duration_s),
            kind=tuple(self._kind),
            stop=tuple(self._stop),
            leaf=np.array(self.leaf, np.int32),
            blocks=np.array(self.blocks, np.int32),
            parent=parent,
            **{name: np.array(column, np.int64) for name, column in self._numbers.items()},
        )


@compiled
def _fill_path(parent: IntArray, leaf: int, path: IntArray) -> None:
    block = leaf
    for depth in range(len(path) - 1, -1, -1):
        path[depth] = block
        block = parent[block]
    assert block == NONE
