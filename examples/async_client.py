"""Many chats over one small pool, with asyncio: park those that are idle, restore who comes back.

    python examples/async_client.py

The "engine" is two arrays for each layer: pages of keys and pages of values.  Its pool has room for four
chats, and twelve talk.  Each chat's KV is recognisable, so whoever got somebody else's would see it.  The
daemon runs inside this process; where a node has one, say `kvtier.connect_async()`.
"""

from __future__ import annotations

import asyncio

import numpy as np

import kvtier
from kvtier import AsyncWorker, Fingerprint, Shard
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool

PAGE_TOKENS, BLOCK_TOKENS, LAYERS, HEADS, DIM = 16, 64, 2, 4, 32
CHATS, ROOMS, TOKENS = 12, 4, 200
PAGES = -(-TOKENS // PAGE_TOKENS)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "hidden_size": 128,
}


class Engine:
    """Pages of KV, and rooms: runs of pages that one chat at a time sits in."""

    def __init__(self) -> None:
        shape = (ROOMS * PAGES, PAGE_TOKENS, HEADS, DIM)
        self.layers = [[np.zeros(shape, np.float16), np.zeros(shape, np.float16)] for _ in range(LAYERS)]
        tensors = [tensor for layer in self.layers for tensor in layer]
        self.pool = Pool(paged(self.layers, "page token head dim", block_tokens=BLOCK_TOKENS), tensors)
        self.rooms: asyncio.Queue[list[int]] = asyncio.Queue()
        for room in range(ROOMS):
            self.rooms.put_nowait(list(range(room * PAGES, (room + 1) * PAGES)))

    def compute(self, chat: int, pages: list[int]) -> None:
        """The prefill of this engine: every row says whose it is."""
        for i, layer in enumerate(self.layers):
            for tensor in layer:
                tensor[pages] = chat + i / 8

    def belongs_to(self, chat: int, pages: list[int]) -> bool:
        """Whether the rows of all tokens are the chat's."""
        rows = [
            tensor[pages].reshape(-1, HEADS, DIM)[:TOKENS] == chat + i / 8
            for i, layer in enumerate(self.layers)
            for tensor in layer
        ]
        return all(bool(row.all()) for row in rows)

    def leave(self, pages: list[int]) -> None:
        """The pages are somebody else's from now on."""
        for layer in self.layers:
            for tensor in layer:
                tensor[pages] = -1
        self.rooms.put_nowait(pages)


def tokens_of(chat: int) -> list[int]:
    """The chat's token ids."""
    return [1000 * chat + position for position in range(TOKENS)]


async def first_turn(worker: AsyncWorker, engine: Engine, chat: int) -> str:
    """Compute, park, and give the pages up as soon as nothing reads them; answers the level reached."""
    pages = await engine.rooms.get()
    engine.compute(chat, pages)
    park = await worker.park(f"chat-{chat}", tokens_of(chat), pages, level="disk", returns_in_s=600)
    await park.released(timeout_s=30)
    engine.leave(pages)
    return (await park.result(timeout_s=30)).level


async def next_turn(worker: AsyncWorker, engine: Engine, chat: int) -> bool:
    """Restore into whatever pages are free; answers whether all of it came back and is the chat's."""
    pages = await engine.rooms.get()
    plan = await worker.plan(f"chat-{chat}", tokens_of(chat))
    receipt = await worker.restore(plan, pages, deadline_s=10)
    right = receipt.tokens == TOKENS and engine.belongs_to(chat, pages)
    engine.leave(pages)
    return right


async def run() -> int:
    """All chats at once, twice."""
    engine = Engine()
    # A real model's fingerprint comes from Fingerprint.of_directory.
    model = Fingerprint.of_revision("example/model@1f0c9a", CONFIG, kv_dtype="float16", layout="example/1")
    async with (
        await kvtier.connect_async("embedded:") as client,
        await client.attach(model, engine.pool, shard=Shard(0, LAYERS, 0, HEADS)) as worker,
    ):
        levels = await asyncio.gather(*(first_turn(worker, engine, chat) for chat in range(CHATS)))
        print(f"parked {levels.count('disk')} of {CHATS} chats on disk, through a pool with room for {ROOMS}")
        right = await asyncio.gather(*(next_turn(worker, engine, chat) for chat in reversed(range(CHATS))))
        print(f"restored {sum(right)} of {CHATS} chats, each with its own KV")
        receipt = await client.forget("chat-3")
        gone = await worker.plan("chat-3", tokens_of(3))
        print(f"forgot chat-3: {receipt.erased_objects} objects erased; then: {gone.reason}")
    return 0 if all(right) and gone.load_tokens == 0 else 1


if __name__ == "__main__":
    raise SystemExit(asyncio.run(run()))
