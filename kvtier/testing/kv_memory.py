"""A small KV pool whose right content can be computed, so that any process can tell what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.client.shards import Shards
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool
from kvtier.gpu.shared_pool import SharedMemory, SharedPool
from kvtier.model.fingerprint import Fingerprint
from kvtier.objects import Shard

LAYERS, HEADS, DIM = 2, 4, 32
PAGE_TOKENS, BLOCK_TOKENS = 16, 32
ROW_BYTES = HEADS * DIM * 2
TOKEN_BYTES = LAYERS * 2 * ROW_BYTES
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
SHARD = Shard(0, LAYERS, 0, HEADS)
POISON = 0xA5
_CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS}

Words = npt.NDArray[np.uint16]


def tokens_of(seed: int, count: int) -> npt.NDArray[np.uint32]:
    """The first `count` tokens of conversation `seed`."""
    return ((np.arange(count, dtype=np.uint64) * 2654435761 + seed * 1000003) % 50021).astype(np.uint32)


def truth(seed: int, plane: int, count: int) -> npt.NDArray[np.uint8]:
    """[count, ROW_BYTES]: the KV of the conversation's first tokens in one plane; a front of any longer."""
    draw = np.random.default_rng([seed, plane])
    return draw.integers(0, 1 << 64, (count, ROW_BYTES // 8), np.uint64, endpoint=False).view(np.uint8)


def ranks_of(count: int) -> Shards:
    """The slices of so many tensor-parallel ranks."""
    heads = HEADS // count
    return Shards(tuple(Shard(0, LAYERS, rank * heads, heads) for rank in range(count)))


class KvMemory:
    """A pool of `pages` pages, K and V of each layer; in shared memory where the daemon shall copy.

    shard: which heads it has.
    """

    def __init__(
        self, pages: int = 64, *, shared: bool = False, revision: str = "org/model@1", shard: Shard = SHARD
    ) -> None:
        self.shard = shard
        shape = (pages, PAGE_TOKENS, shard.heads, DIM)
        nbytes = int(np.prod(shape)) * 2
        self.memory = SharedMemory.create(2 * LAYERS * nbytes) if shared else None
        self.planes: list[Words] = [self._plane(shape) for _ in range(2 * LAYERS)]
        pairs = list(zip(self.planes[0::2], self.planes[1::2], strict=True))
        layout = paged(pairs, "page token head dim", block_tokens=BLOCK_TOKENS)
        self.pool: Pool | SharedPool = (
            Pool(layout, self.planes) if self.memory is None else SharedPool.create(layout, self.memory)
        )
        self.model = Fingerprint.of_revision(revision, _CONFIG, kv_dtype="bf16", layout=layout.layout_id)
        self.poison(range(pages))

    def _plane(self, shape: tuple[int, ...]) -> Words:
        if self.memory is None:
            return np.zeros(shape, np.uint16)
        made: Any = self.memory.array(shape, np.uint16)
        return made  # type: ignore[no-any-return]  # an array of uint16, as asked for

    def put(self, seed: int, pages: Sequence[int], count: int) -> None:
        """Lay the conversation's first `count` tokens into the pages."""
        for plane, memory in enumerate(self.planes):
            rows = self._rows(memory, pages)
            rows[:count] = self._truth(seed, plane, count)
            memory[list(pages)] = rows.view(np.uint16).reshape(len(pages), *memory.shape[1:])

    def poison(self, pages: Sequence[int]) -> None:
        """Fill the pages with what no conversation has."""
        for memory in self.planes:
            memory[list(pages)] = POISON * 0x0101

    def front(self, seed: int, pages: Sequence[int], count: int) -> int:
        """How many of the first `count` tokens in the pages are right before the first wrong one."""
        right = np.ones(count, bool)
        for plane, memory in enumerate(self.planes):
            right &= (self._rows(memory, pages)[:count] == self._truth(seed, plane, count)).all(axis=1)
        wrong = np.flatnonzero(~right)
        return int(wrong[0]) if wrong.size else count

    def strange(self, seed: int, pages: Sequence[int], count: int) -> int:
        """How many rows of the pages are neither the conversation's nor poison: written by somebody else."""
        found = 0
        for plane, memory in enumerate(self.planes):
            rows = self._rows(memory, pages)
            mine = np.zeros(len(rows), bool)
            mine[:count] = (rows[:count] == self._truth(seed, plane, count)).all(axis=1)
            found += int((~(mine | (rows == POISON).all(axis=1))).sum())
        return found

    def close(self) -> None:
        """Let go of shared memory."""
        if self.memory is not None:
            self.memory.close()

    def _truth(self, seed: int, plane: int, count: int) -> npt.NDArray[np.uint8]:
        first = self.shard.first_head * DIM * 2
        return truth(seed, plane, count)[:, first : first + self.shard.heads * DIM * 2]

    @staticmethod
    def _rows(memory: Words, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        return np.ascontiguousarray(memory[list(pages)]).view(np.uint8).reshape(len(pages) * PAGE_TOKENS, -1)


def pages_for(count: int, first: int = 0) -> list[int]:
    """As many pages as `count` tokens need, from page `first` on, not in order."""
    needed = -(-count // PAGE_TOKENS)
    return [first + (index * 7) % needed if needed % 7 else first + index for index in range(needed)]
