"""A model of the transformers library, with random weights: its own cache is parked, lost, and restored.

The cache's tensors lie on the GPU, one for K and V of each layer; the engine copies them as they are.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.rig import Bench
from kvtier.bench.lines import Line
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.measure import copy_once
from kvtier.gpu.describe import contiguous
from kvtier.gpu.engine import CopyItem
from kvtier.gpu.pool import Binding, bind_sequence
from kvtier.testing.fake_device import FakeDevice

BLOCK = 64
TURN = 8
DIMS = "batch head token dim"


def library(bench: Bench) -> list[Line]:
    """Logits after a restore against the uninterrupted run's; or a line that says why there are none."""
    try:
        import transformers
    except ImportError as error:
        return [Line("transformers was run", 0.0, "bool", detail={"why_not": str(error)[:200]})]
    import torch

    where, kind = ("cpu", torch.float32) if bench.dry else ("cuda", torch.bfloat16)
    wide = 32 if bench.dry else 4096
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=wide,
        intermediate_size=2 * wide,
        num_hidden_layers=2 if bench.dry else 8,
        num_attention_heads=4 if bench.dry else 32,
        num_key_value_heads=2 if bench.dry else 8,
        head_dim=8 if bench.dry else 128,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config).to(device=where, dtype=kind).eval()
    count = 2 * BLOCK if bench.dry else 2048
    ids = torch.randint(0, 512, (1, count + TURN), device=where)
    with torch.inference_mode():
        cache = net(input_ids=ids[:, :count], use_cache=True).past_key_values
        kept = _tensors(cache)
        wanted = net(input_ids=ids[:, count:], past_key_values=_cache(transformers, config, kept)).logits
        same, nbytes = _through(bench, torch, kept, count)
        found = _cache(transformers, config, same)
        got = net(input_ids=ids[:, count:], past_key_values=found).logits
        equal = bool(torch.equal(got, wanted))
    detail = {"transformers": transformers.__version__, "kv_bytes": nbytes, "tokens": count}
    return [
        Line(
            "logits of a transformers model after restore bit-identical", float(equal), "bool", detail=detail
        )
    ]


def _tensors(cache: Any) -> list[tuple[Any, Any]]:
    return [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]


def _cache(transformers: Any, config: Any, tensors: list[tuple[Any, Any]]) -> Any:
    made = transformers.DynamicCache(config=config)
    for number, (keys, values) in enumerate(tensors):
        made.update(keys.clone(), values.clone(), number)
    return made


def _through(
    bench: Bench, torch: Any, kept: list[tuple[Any, Any]], count: int
) -> tuple[list[tuple[Any, Any]], int]:
    """Park these tensors and restore them into others, which were full of ones."""
    other = [(torch.ones_like(keys), torch.ones_like(values)) for keys, values in kept]
    if not bench.dry:
        torch.cuda.synchronize()
    for pair in (*kept, *other):
        for tensor in pair if isinstance(bench.device, FakeDevice) else ():
            bench.device.adopt(tensor.numpy())  # type: ignore[attr-defined]
    layout = contiguous(kept, DIMS, block_tokens=BLOCK)
    size = layout.geometry.groups[0].object_bytes(BLOCK)
    items = [CopyItem(0, i * BLOCK, BLOCK, 0, i, 1, (0, i * size), size) for i in range(count // BLOCK)]
    with (
        bench.arena(size * len(items), len(items)) as arena,
        bench.engine(arena, size * len(items)) as engine,
    ):
        sums = _move(engine, "gather", bind_sequence(layout, kept, DIMS), items)
        again = [CopyItem(0, i.start, BLOCK, 0, n, 1, i.address, size, sums[n]) for n, i in enumerate(items)]
        _move(engine, "scatter", bind_sequence(layout, other, DIMS), again)
    return other, size * len(items)


def _move(
    engine: CudaCopyEngine, direction: Any, binding: Binding, items: list[CopyItem]
) -> tuple[int | None, ...]:
    return copy_once(engine, direction, binding, items, True)[1].checksums
