"""A worker without a daemon: what kvtier promises to an integration, in the plainest way, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvtier import keys
from kvtier.geometry import Geometry
from kvtier.gpu.pool import Binding
from kvtier.integrations.dynamic_cache import cache_shape
from kvtier.integrations.transformers import TransformersKV
from kvtier.objects import Root
from kvtier.receipts import ParkReceipt, Plan, Reason, RestoreReceipt, TokenRange

ROOT_KEY = b"r" * 32


@dataclass
class StoredBlock:
    """One object: rows [first_valid, tokens) of each plane, and the checksum that it was given."""

    first_valid: int
    planes: list[npt.NDArray[np.uint8]]
    checksum: int

    @staticmethod
    def sum_of(planes: list[npt.NDArray[np.uint8]]) -> int:
        return hash(tuple(plane.tobytes() for plane in planes))


@dataclass
class DoneHandle:
    """A park that was over when it began."""

    receipt: ParkReceipt

    def result(self, timeout_s: float | None = None) -> ParkReceipt:
        return self.receipt


@dataclass
class MemoryWorker:
    """Stores blocks by key; `verify` off is how a broken store behaves."""

    geometry: Geometry
    verify: bool = True
    blocks: dict[tuple[bytes, int], StoredBlock] = field(default_factory=dict)
    known: set[bytes] = field(default_factory=set)
    tails: dict[bytes, set[int]] = field(default_factory=dict)
    private: dict[tuple[str, str], keys.Extra] = field(default_factory=dict)
    planned: dict[str, list[keys.BlockRef]] = field(default_factory=dict)
    restored_at_most: int | None = None
    prefills: list[tuple[int, int, float]] = field(default_factory=list)
    plans: list[tuple[float | None, str]] = field(default_factory=list)
    queues: list[tuple[int, float]] = field(default_factory=list)

    def _root(self) -> Root:
        return Root(ROOT_KEY, "t", b"f" * 32, "exact", self.geometry.block_tokens)

    def park(
        self,
        conversation: str,
        tokens: Sequence[int],
        pages: Binding,
        *,
        tenant: str = "default",
        level: Literal["host", "disk"] = "host",
        share: str = "prefix",
        fidelity: str = "exact",
        codec: str = "",
        returns_in_s: float | None = None,
        keep_for_s: float | None = None,
    ) -> DoneHandle:
        assert fidelity == "exact" and not codec
        assert all(end == len(tokens) for end in pages.ends)
        name = (tenant, conversation)
        if share == "conversation":
            self.private.setdefault(name, (0, repr(name).encode()))
        stored = shared = 0
        for ref in keys.chain(self._root(), keys.pack_tokens(tokens), private=self.private.get(name)):
            self.known.add(ref.key)
            if ref.tokens < self.geometry.block_tokens:
                self.tails.setdefault(ref.parent, set()).add(ref.tokens)
            for group in range(len(self.geometry.groups)):
                first_valid = max(0, pages.bases[group] - ref.start)
                old = self.blocks.get((ref.key, group))
                if first_valid >= ref.tokens or (old is not None and old.first_valid <= first_valid):
                    shared += 1
                    continue
                planes = [rows.copy() for rows in _rows(pages, group, ref, first_valid)]
                self.blocks[ref.key, group] = StoredBlock(first_valid, planes, StoredBlock.sum_of(planes))
                stored += 1
        return DoneHandle(ParkReceipt(conversation, tenant, level, level, True, len(tokens), stored, shared))

    def plan(
        self,
        conversation: str,
        tokens: Sequence[int],
        *,
        tenant: str = "default",
        fidelity: str = "exact",
        deadline_s: float | None = None,
        takes: str = "fronts",
        waiting: int = 0,
        prefill_wait_s: float = 0.0,
    ) -> Plan:
        assert fidelity == "exact"
        self.plans.append((deadline_s, takes))
        self.queues.append((waiting, prefill_wait_s))
        packed, private = keys.pack_tokens(tokens), self.private.get((tenant, conversation))
        refs: list[keys.BlockRef] = []
        for ref in keys.chain(self._root(), packed, private=private):
            if ref.tokens < self.geometry.block_tokens or not self._whole(ref):
                refs += self._tail(refs, packed, private)
                break
            refs.append(ref)
        while refs and not self._windows(refs):
            refs.pop()
        count = sum(ref.tokens for ref in refs)
        ranges = [TokenRange(0, count, "host")] if count else []
        plan_id = str(len(self.planned)) if count else ""
        self.planned[plan_id] = refs
        ranges.append(TokenRange(count, len(tokens), "compute"))
        return Plan(
            plan_id, conversation, tenant, len(tokens), tuple(ranges), reason="" if count else "no_match"
        )

    def _whole(self, ref: keys.BlockRef) -> bool:
        full = [g for g, group in enumerate(self.geometry.groups) if group.kind == "full"]
        return ref.key in self.known and all((ref.key, g) in self.blocks for g in full)

    def _tail(
        self, refs: list[keys.BlockRef], packed: bytes, private: keys.Extra | None
    ) -> list[keys.BlockRef]:
        start = sum(ref.tokens for ref in refs)
        parent = refs[-1].key if refs else ROOT_KEY
        for count in sorted(self.tails.get(parent, ()), reverse=True):
            if start * 4 + count * 4 <= len(packed):
                tail = keys.chain(self._root(), packed[: (start + count) * 4], private=private)[-1]
                if self._whole(tail):
                    return [tail]
        return []

    def _windows(self, refs: list[keys.BlockRef]) -> bool:
        end = refs[-1].start + refs[-1].tokens
        for g, group in enumerate(self.geometry.groups):
            needed = group.needed_from(end)
            for ref in refs:
                if ref.start + ref.tokens > needed:
                    block = self.blocks.get((ref.key, g))
                    if block is None or ref.start + block.first_valid > max(needed, ref.start):
                        return False
        return True

    def prefilled(self, tokens: int, seconds: float, *, past: int = 0) -> None:
        self.prefills.append((past, tokens, seconds))

    def restore(self, plan: Plan, pages: Binding, *, deadline_s: float = 30.0) -> RestoreReceipt:
        refs = self.planned[plan.plan_id]
        end = 0
        for ref in refs:
            for g, group in enumerate(self.geometry.groups):
                if ref.start + ref.tokens <= group.needed_from(plan.load_tokens):
                    continue
                block = self.blocks[ref.key, g]
                if self.verify and StoredBlock.sum_of(block.planes) != block.checksum:
                    return RestoreReceipt(
                        plan.conversation, plan.tenant, end, plan.load_tokens, reason="corrupt"
                    )
                targets = _rows(pages, g, ref, block.first_valid)
                for target, plane in zip(targets, block.planes, strict=True):
                    target[...] = plane
            end = ref.start + ref.tokens
            if self.restored_at_most is not None and end >= self.restored_at_most:
                break
        reason: Reason = "" if end == plan.load_tokens else "deadline"
        return RestoreReceipt(
            plan.conversation, plan.tenant, end, plan.load_tokens, {"host": end}, reason=reason
        )


def _rows(pages: Binding, group: int, ref: keys.BlockRef, first_valid: int) -> list[npt.NDArray[np.uint8]]:
    pages.check(group, ref.start, ref.tokens, first_valid)
    row = pages.row_of(group, ref.start)
    return [view.rows[0, :, row + first_valid : row + ref.tokens] for view in pages.views[group]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and wait for each other where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def memory_kv() -> Callable[..., TransformersKV]:
    """kv = memory_kv(model, block_tokens): attached to a MemoryWorker of its own."""

    def attach(model: Any, block_tokens: int = 16) -> TransformersKV:
        shape = cache_shape(model, block_tokens)
        worker: Any = MemoryWorker(shape.layout.geometry)
        return TransformersKV(worker, shape)

    return attach
