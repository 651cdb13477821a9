"""Two ranks that hold half of each layer's heads park and restore a DynamicCache together, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import kvtier
from kvtier import Fingerprint, Shards
from kvtier.daemon import embedded
from kvtier.errors import GeometryError
from kvtier.integrations.dynamic_cache import cache_shape
from kvtier.integrations.transformers import Restored, TransformersKV, attach
from kvtier.objects import Shard
from kvtier.testing.small_model import PATTERN, SIZES

RANKS, BLOCK, CHAT, TURN = 2, 16, 70, 9


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(5)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=24, layer_types=PATTERN)).eval()


@pytest.fixture
def ranks(model: Any, tmp_path: Path) -> Iterator[list[TransformersKV]]:
    """Each with its own connections, as processes of their own have them."""
    shards = Shards.of(cache_shape(model, BLOCK).spec, tp=RANKS)
    overrides = {
        "node.state_dir": str(tmp_path / "state"),
        "host.capacity_bytes": 16 << 20,
        "host.headroom_bytes": 0,
        "disk.capacity_bytes": 64 << 20,
        "disk.segment_bytes": 8 << 20,
        "policy.restore": "load",
    }
    with ExitStack() as stack:
        daemon = stack.enter_context(closing(embedded.start(**overrides)))
        made = []
        for rank in range(RANKS):
            client = stack.enter_context(closing(kvtier.connect(daemon.socket_path)))
            identity = Fingerprint(b"f" * 32, "test")
            kv = attach(
                client, model, fingerprint=identity, shard=shards[rank], ranks=shards, block_tokens=BLOCK
            )
            made.append(stack.enter_context(kv))
        yield made


def slice_of(model: Any, cache: DynamicCache, rank: int) -> DynamicCache:
    """The cache as this rank of a tensor-parallel run has it."""
    heads = SIZES["num_key_value_heads"] // RANKS
    own = DynamicCache(config=model.config)
    for ours, layer in zip(own.layers, cache.layers, strict=True):
        keys, values = (x[:, rank * heads : (rank + 1) * heads].clone() for x in (layer.keys, layer.values))
        ours.lazy_initialization(keys, values)
        ours.keys, ours.values = keys, values
        if hasattr(layer, "cumulative_length"):
            ours.cumulative_length = layer.cumulative_length
    return own


def joined(model: Any, caches: list[DynamicCache]) -> DynamicCache:
    """The cache that the ranks' slices make."""
    whole = DynamicCache(config=model.config)
    for index, ours in enumerate(whole.layers):
        parts = [cache.layers[index] for cache in caches]
        keys = torch.cat([part.keys for part in parts], dim=1)
        values = torch.cat([part.values for part in parts], dim=1)
        ours.lazy_initialization(keys, values)
        ours.keys, ours.values = keys, values
        if hasattr(parts[0], "cumulative_length"):
            ours.cumulative_length = parts[0].cumulative_length
    return whole


def restored(ranks: list[TransformersKV], tokens: list[int]) -> list[Restored]:
    """One plans for all, all load at once."""
    plan = ranks[0].plan("chat", tokens)
    plans = [plan, *(kv.join(plan.plan_id) for kv in ranks[1:])]
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda kv, part: kv.load(part, deadline_s=20.0), ranks, plans))


@torch.no_grad()
def test_the_next_turn_has_the_bits_of_the_uninterrupted_run(model: Any, ranks: list[TransformersKV]) -> None:
    tokens = torch.randint(0, 97, (1, CHAT + TURN))
    told = tokens[0].tolist()
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens[:, :CHAT], past_key_values=cache)
    parks = [
        kv.park("chat", told[:CHAT], slice_of(model, cache, rank), level="disk", share="conversation")
        for rank, kv in enumerate(ranks)
    ]
    assert [park.result(timeout_s=20.0).level for park in parks] == ["disk"] * RANKS
    got = restored(ranks, told)
    assert [one.tokens for one in got] == [CHAT] * RANKS
    assert all(one.receipt.ok for one in got)
    again = model(input_ids=tokens[:, CHAT:], past_key_values=joined(model, [one.cache for one in got]))
    right = model(input_ids=tokens[:, CHAT:], past_key_values=cache)
    assert torch.equal(again.logits.view(torch.int32), right.logits.view(torch.int32))
    # The other rank's heads would be another cache, and the bits tell.
    wrong = model(
        input_ids=tokens[:, CHAT:],
        past_key_values=joined(model, [one.cache for one in restored(ranks, told)][::-1]),
    )
    assert not torch.equal(wrong.logits.view(torch.int32), right.logits.view(torch.int32))


@torch.no_grad()
def test_a_rank_whose_cache_has_all_heads_is_refused(model: Any, ranks: list[TransformersKV]) -> None:
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(0, 97, (1, 20))
    model(input_ids=tokens, past_key_values=cache)
    with pytest.raises(GeometryError, match="1 of 8 for this rank"):
        ranks[0].park("chat", tokens[0].tolist(), cache)


def test_what_nobody_has_parked_is_a_miss_on_every_rank(ranks: list[TransformersKV]) -> None:
    got = restored(ranks, list(range(40)))
    assert [one.tokens for one in got] == [0] * RANKS
    assert all(one.receipt.reason for one in got)


def test_slices_of_layers_are_refused(model: Any) -> None:
    with pytest.raises(GeometryError, match="layers"):
        cache_shape(model, BLOCK, Shard(0, 1, 0, 2))
