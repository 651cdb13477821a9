"""What conversations say, and the KV that belongs to it: any process can tell what is wrong.

The KV of a token is a function of model, tenant and all tokens up to it, as a real model's is; so bytes of
another branch, another conversation, another tenant or another model are wrong bytes here too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.objects import Shard
from kvtier.testing.kv_memory import HEADS, LAYERS, PAGE_TOKENS, POISON, ROW_BYTES, KvMemory

PLANES = 2 * LAYERS
Rows: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Text:
    """A conversation's tokens: pieces of (seed, tokens), each drawn after all that stands before it."""

    pieces: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Tokens."""
        return sum(tokens for _, tokens in self.pieces)

    def cut(self, count: int) -> Text:
        """Its first tokens."""
        kept, left = [], count
        for seed, tokens in self.pieces:
            if left <= 0:
                break
            kept.append((seed, min(tokens, left)))
            left -= tokens
        return Text(tuple(kept))

    def grown(self, seed: int, count: int) -> Text:
        """With one more piece."""
        return Text((*self.pieces, (seed, count)))

    def begins(self, other: Text) -> bool:
        """Whether the other one begins with this."""
        return other.cut(self.count).normal() == self.normal()

    def shared(self, other: Text) -> int:
        """How many tokens both begin with."""
        count = 0
        for (seed, mine), (theirs_seed, theirs) in zip(self.pieces, other.pieces, strict=False):
            if seed != theirs_seed:
                break
            count += min(mine, theirs)
            if mine != theirs:
                break
        return count

    def normal(self) -> tuple[tuple[int, int], ...]:
        """The same for the same tokens."""
        return tuple(piece for piece in self.pieces if piece[1])

    def tokens(self) -> npt.NDArray[np.uint32]:
        """Token ids, uint32 [count]."""
        drawn = [
            np.random.default_rng(state).integers(0, 1 << 32, count, np.uint32)
            for state, (_, count) in zip(self._states(b"tokens"), self.pieces, strict=True)
        ]
        return np.concatenate(drawn) if drawn else np.zeros(0, np.uint32)

    def rows(self, owner: str, plane: int) -> Rows:
        """uint8 [count, ROW_BYTES]: the KV in one plane. owner: model and tenant.

        Numbers in bfloat16, of size 0.008 to 2, which codecs make smaller.
        """
        drawn = [
            np.random.default_rng([plane, state]).integers(0, 1 << 64, (count, ROW_BYTES // 8), np.uint64)
            for state, (_, count) in zip(self._states(owner.encode()), self.pieces, strict=True)
        ]
        return ((np.concatenate(drawn).view(np.uint16) & 0x83FF) | 0x3C00).view(np.uint8)

    def _states(self, origin: bytes) -> list[int]:
        """For each piece a number that stands for everything up to its first token."""
        digest, states, start = hashlib.sha256(origin).digest(), [], 0
        for seed, count in self.pieces:
            digest = hashlib.sha256(
                digest + seed.to_bytes(8, "little") + start.to_bytes(8, "little")
            ).digest()
            states.append(int.from_bytes(digest[:8], "little"))
            start += count
        return states


class TextMemory(KvMemory):
    """A pool of pages that texts are laid into. model: its number; another one has another fingerprint.

    shard: the slice that this rank holds.
    """

    def __init__(self, pages: int, model: int, shard: Shard) -> None:
        super().__init__(pages, revision=f"chaos/model@{model}", shard=shard)
        self.number = model

    def lay(self, text: Text, tenant: str, pages: Sequence[int]) -> None:
        """Put the text's KV into the pages."""
        for plane, memory in enumerate(self.planes):
            rows = self._rows(memory, pages)
            rows[: text.count] = self._slice(text, tenant, plane)
            memory[list(pages)] = rows.view(np.uint16).reshape(len(pages), *memory.shape[1:])

    def right(self, text: Text, tenant: str, pages: Sequence[int]) -> int:
        """How many tokens in the pages are right before the first wrong one."""
        found = np.ones(text.count, bool)
        for plane, memory in enumerate(self.planes):
            rows = self._slice(text, tenant, plane)
            found &= (self._rows(memory, pages)[: text.count] == rows).all(axis=1)
        wrong = np.flatnonzero(~found)
        return int(wrong[0]) if wrong.size else text.count

    def untouched(self, pages: Sequence[int]) -> bool:
        """Whether nobody wrote into these pages since they were poisoned."""
        return all(bool((memory[list(pages)] == POISON * 0x0101).all()) for memory in self.planes)

    def _slice(self, text: Text, tenant: str, plane: int) -> Rows:
        head_bytes = ROW_BYTES // HEADS
        first = self.shard.first_head * head_bytes
        rows = text.rows(f"{self.number}/{tenant}", plane)
        return rows[:, first : first + self.shard.heads * head_bytes]


def pages_of(text: Text) -> int:
    """How many pages it takes."""
    return -(-text.count // PAGE_TOKENS)


def longest_shared(text: Text, others: Sequence[Text]) -> int:
    """How many of its first tokens some other text has too."""
    return max((text.shared(other) for other in others), default=0)
