"""A decoder of Llama-3-8B's geometry with random weights: resumed to the bit, and how soon.

Written on torch alone, with a paged pool of its own, so that what is measured does not depend on a library's
cache.  Greater contexts than the memory allows are left out, and said so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gpu.rig import Bench, Conversation, Sizes, start, with_checksums
from kvtier.bench.lines import Line
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.describe import paged
from kvtier.gpu.engine import CopyItem
from kvtier.gpu.pool import Pool
from kvtier.testing.fake_device import FakeDevice

TURN_TOKENS = 16
PREFILL_CHUNK = 4096
SPARE_BYTES = 12 << 30


class Decoder:
    """Grouped-query attention over paged KV, rotary positions, gated layers. x: [tokens, hidden]."""

    def __init__(self, torch: Any, sizes: Sizes, pages: int, where: str, kind: Any) -> None:
        self.torch, self.sizes = torch, sizes
        torch.manual_seed(0)
        make = {"device": where, "dtype": kind}

        def weight(*shape: int) -> Any:
            return torch.randn(*shape, **make) * shape[0] ** -0.5

        kv = sizes.kv_heads * sizes.head_dim
        self.embed = torch.randn(sizes.vocabulary, sizes.hidden, **make)
        self.layers = [
            {
                "q": weight(sizes.hidden, sizes.heads * sizes.head_dim),
                "k": weight(sizes.hidden, kv),
                "v": weight(sizes.hidden, kv),
                "o": weight(sizes.heads * sizes.head_dim, sizes.hidden),
                "gate": weight(sizes.hidden, sizes.inner),
                "up": weight(sizes.hidden, sizes.inner),
                "down": weight(sizes.inner, sizes.hidden),
            }
            for _ in range(sizes.layers)
        ]
        shape = (pages, sizes.page_tokens, sizes.kv_heads, sizes.head_dim)
        self.pool = [(torch.zeros(shape, **make), torch.zeros(shape, **make)) for _ in range(sizes.layers)]
        half = torch.arange(0, sizes.head_dim, 2, device=where, dtype=torch.float32) / sizes.head_dim
        self.rates = 500000.0**-half

    def run(self, ids: Any, start_at: int, table: Any) -> Any:
        """Logits of the last token; KV of `ids` goes into the pages of `table` from position start_at on."""
        torch, sizes = self.torch, self.sizes
        x = self.embed[ids]
        at = torch.arange(start_at, start_at + len(ids), device=x.device)
        angle = at[:, None] * self.rates
        turn = (angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None])
        there = table[at // sizes.page_tokens] * sizes.page_tokens + at % sizes.page_tokens
        upto = start_at + len(ids)
        used = table[: -(-upto // sizes.page_tokens)]
        for layer, (keys, values) in zip(self.layers, self.pool, strict=True):
            h = torch.nn.functional.rms_norm(x, (sizes.hidden,))
            q = self._turned((h @ layer["q"]).view(len(ids), sizes.heads, -1), turn)
            k = self._turned((h @ layer["k"]).view(len(ids), sizes.kv_heads, -1), turn)
            keys.view(-1, sizes.kv_heads, sizes.head_dim)[there] = k
            values.view(-1, sizes.kv_heads, sizes.head_dim)[there] = (h @ layer["v"]).view_as(k)
            x = x + self._attend(q, keys[used], values[used], upto) @ layer["o"]
            h = torch.nn.functional.rms_norm(x, (sizes.hidden,))
            x = x + (torch.nn.functional.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
        return torch.nn.functional.rms_norm(x[-1], (sizes.hidden,)) @ self.embed.T

    def _turned(self, x: Any, turn: tuple[Any, Any]) -> Any:
        a, b = x.chunk(2, -1)
        return self.torch.cat((a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]), -1)

    def _attend(self, q: Any, keys: Any, values: Any, upto: int) -> Any:
        from torch.nn.attention.bias import causal_lower_right

        k, v = (t.flatten(0, 1)[:upto].transpose(0, 1)[None] for t in (keys, values))
        # Repeated, since not every kernel that takes this mask takes grouped heads.
        k, v = (t.repeat_interleave(self.sizes.heads // self.sizes.kv_heads, 1) for t in (k, v))
        mask = causal_lower_right(q.shape[0], upto)
        attend = self.torch.nn.functional.scaled_dot_product_attention
        out = attend(q.transpose(0, 1)[None], k, v, attn_mask=mask)
        return out[0].transpose(0, 1).flatten(1)

    def prefill(self, ids: Any, table: Any) -> Any:
        """run() in chunks."""
        logits = None
        for at in range(0, len(ids), PREFILL_CHUNK):
            logits = self.run(ids[at : at + PREFILL_CHUNK], at, table)
        return logits


def model(bench: Bench) -> list[Line]:
    """Park, lose the pages, restore elsewhere, go on: same bits; and times to the next turn's first token."""
    import torch

    sizes = bench.sizes
    where, kind = ("cpu", torch.float32) if bench.dry else ("cuda", torch.bfloat16)
    sizes = _that_fit(bench, sizes)
    longest = sizes.contexts[-1] + TURN_TOKENS
    pages = 2 * -(-longest // sizes.page_tokens)
    with torch.inference_mode():
        decoder = Decoder(torch, sizes, pages, where, kind)
        pool = _pool(bench, decoder)
        token_bytes = pool.layout.token_bytes(0)
        nbytes = sizes.contexts[-1] * token_bytes
        with (
            bench.arena(nbytes, sizes.contexts[-1] // sizes.block_tokens) as arena,
            bench.engine(arena, nbytes) as engine,
        ):
            return [
                line
                for tokens in sizes.contexts
                for line in _one_context(bench, decoder, pool, engine, tokens, where)
            ]


def _that_fit(bench: Bench, sizes: Sizes) -> Sizes:
    """Contexts whose KV, twice, and the weights fit beside some room for activations."""
    if bench.dry:
        return sizes
    layer = sizes.hidden * (
        2 * sizes.heads * sizes.head_dim + 2 * sizes.kv_heads * sizes.head_dim + 3 * sizes.inner
    )
    weights = 2 * (sizes.layers * layer + sizes.vocabulary * sizes.hidden)
    free = bench.device.memory_info()[0] - SPARE_BYTES - weights
    token = 2 * sizes.layers * 2 * sizes.row_bytes
    return replace(sizes, contexts=tuple(n for n in sizes.contexts if (n + TURN_TOKENS) * token < free))


def _pool(bench: Bench, decoder: Decoder) -> Pool:
    tensors = [t for pair in decoder.pool for t in pair]
    if isinstance(bench.device, FakeDevice):
        for tensor in tensors:
            bench.device.adopt(tensor.numpy().reshape(-1).view(np.uint8))
    layout = paged(decoder.pool, "page token head dim", block_tokens=decoder.sizes.block_tokens)
    return Pool(layout, tensors)


def _items(pool: Pool, tokens: int) -> list[CopyItem]:
    block = pool.layout.block_tokens
    nbytes = block * pool.layout.token_bytes(0)
    return [CopyItem(0, i * block, block, 0, i, 1, (0, i * nbytes), nbytes) for i in range(tokens // block)]


def _one_context(
    bench: Bench, decoder: Decoder, pool: Pool, engine: CudaCopyEngine, tokens: int, where: str
) -> list[Line]:
    torch, sizes = decoder.torch, decoder.sizes
    ids = torch.randint(0, sizes.vocabulary, (tokens + TURN_TOKENS,), device=where)
    count = -(-(tokens + TURN_TOKENS) // sizes.page_tokens)
    order = np.random.default_rng(tokens).permutation(2 * count)
    table, other = (torch.tensor(part.copy(), device=where) for part in (order[:count], order[count:]))
    decoder.prefill(ids[:tokens], table)
    here = Conversation(pool.bind(order[:count]), _items(pool, tokens), tokens * pool.layout.token_bytes(0))
    wait = torch.cuda.synchronize if where == "cuda" else _nothing
    wait()
    job = start(engine, "gather", here, sizes, verify=True)
    sums = job.wait_checksums()
    wanted = decoder.run(ids[tokens:], tokens, table)
    for pair in decoder.pool:
        for tensor in pair:
            tensor.fill_(float("nan"))
    wait()
    there = with_checksums(Conversation(pool.bind(order[count:]), here.items, here.nbytes), sums)
    restored, recomputed, same = [], [], True
    for turn in range(2):
        begun = time.perf_counter()
        start(engine, "scatter", there, sizes, verify=True).wait()
        got = decoder.run(ids[tokens:], tokens, other)
        wait()
        restored.append(time.perf_counter() - begun)
        same = same and bool(torch.equal(got, wanted))
        begun = time.perf_counter()
        decoder.prefill(ids, table)
        wait()
        recomputed.append(time.perf_counter() - begun)
        del turn
    return _lines(tokens, here.nbytes, same, restored[1:], recomputed[1:])


def _nothing() -> None:
    """The CPU has nothing to wait for."""


def _lines(
    tokens: int, nbytes: int, same: bool, restored: Sequence[float], recomputed: Sequence[float]
) -> list[Line]:
    ours, theirs = statistics.median(restored), statistics.median(recomputed)
    even = round(nbytes / theirs / 1e9, 3)
    return [
        Line(f"logits after restore bit-identical, {tokens} tokens", float(same), "bool"),
        Line(
            f"time to first token, {tokens} tokens restored",
            round(ours * 1e3, 2),
            "ms",
            round(theirs * 1e3, 2),
            round(ours / theirs, 4),
            {"limit_is": "recomputed", "break_even_gb_s": even, "kv_bytes": nbytes},
        ),
    ]
