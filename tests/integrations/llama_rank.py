"""One tensor-parallel rank of a Llama, a process of its own: the KV of its heads in a paged pool.

It reads one JSON object a line and answers each with one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.client.client import connect
from kvtier.client.shards import Shards
from kvtier.client.worker_inputs import WorkerPlan
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool
from kvtier.model.fingerprint import Fingerprint
from kvtier.model.spec import ModelSpec

PAGES, PAGE_TOKENS, BLOCK_TOKENS = 40, 8, 16


class Rank:
    """The pool, and what is done with it. KV travels as files: [layers, K and V, heads, tokens, dim]."""

    def __init__(self, path: str, config: str, rank: int, count: int) -> None:
        spec = ModelSpec.from_config(json.loads(Path(config).read_text()), kv_dtype="float32")
        ranks = Shards.of(spec, tp=count)
        shape = (PAGES, PAGE_TOKENS, ranks[rank].heads, spec.head_dim)
        self.planes = [np.full(shape, np.nan, np.float32) for _ in range(2 * spec.layers)]
        pairs = list(zip(self.planes[0::2], self.planes[1::2], strict=True))
        layout = paged(pairs, "page token head dim", block_tokens=BLOCK_TOKENS)
        # No two ranks use the same pages.
        self.pages = list(np.random.default_rng(rank).permutation(PAGES))
        self.worker = connect(path).attach(
            Fingerprint(b"f" * 32, "test"), Pool(layout, self.planes), shard=ranks[rank], ranks=ranks
        )
        self.plan: WorkerPlan | None = None

    def park(self, conversation: str, tokens: list[int], file: str) -> dict[str, Any]:
        kv = np.load(file)
        for plane, rows in zip(self.planes, kv.reshape(-1, *kv.shape[2:]), strict=True):
            for at in range(len(tokens)):
                plane[self.pages[at // PAGE_TOKENS], at % PAGE_TOKENS] = rows[:, at]
        park = self.worker.park(
            conversation, tokens, self._pages(len(tokens)), level="disk", share="conversation"
        )
        receipt = park.result()
        return {"level": receipt.level, "tokens": receipt.tokens, "reason": receipt.reason}

    def make_plan(self, conversation: str, tokens: list[int]) -> str:
        self.plan = self.worker.plan(conversation, tokens)
        return self.plan.plan_id

    def join(self, plan_id: str) -> str:
        self.plan = self.worker.join(plan_id)
        return self.plan.plan_id

    def restore(self, file: str) -> int:
        assert self.plan is not None
        pages = self._pages(self.plan.load_tokens)
        got = self.worker.restore(self.plan, pages, deadline_s=20.0)
        rows = [plane[pages].reshape(-1, *plane.shape[2:])[: got.tokens] for plane in self.planes]
        kv = np.stack(rows).swapaxes(1, 2)
        np.save(file, kv.reshape(-1, 2, *kv.shape[1:]))
        return got.tokens

    def _pages(self, tokens: int) -> list[int]:
        return [int(page) for page in self.pages[: -(-tokens // PAGE_TOKENS)]]


def main(path: str, config: str, rank: str, count: str) -> None:
    """Answer until standard input ends."""
    station = Rank(path, config, int(rank), int(count))
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(station, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
