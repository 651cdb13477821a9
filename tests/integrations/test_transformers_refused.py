"""What cannot be parked or restored says so, before anything is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer

from kvtier.errors import FingerprintError, GeometryError, TokensError
from kvtier.integrations.dynamic_cache import cache_shape
from kvtier.integrations.transformers import ChatSession, TransformersKV, attach, model_fingerprint
from kvtier.model.fingerprint import Fingerprint
from kvtier.objects import Shard

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
Attach = Callable[..., TransformersKV]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def filled(model: Any, cache: Any, tokens: int = 20, batch: int = 1) -> Any:
    ids = torch.arange(tokens).repeat(batch, 1)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
    return cache


def is_refused(kv: TransformersKV, cache: Any, match: str, tokens: int = 20) -> None:
    worker: Any = kv.worker
    with pytest.raises(GeometryError, match=match):
        kv.park("chat", list(range(tokens)), cache)
    assert not worker.blocks


def test_caches_of_other_kinds_are_refused(model: Any, memory_kv: Attach) -> None:
    kv = memory_kv(model)
    static = filled(model, StaticCache(config=model.config, max_cache_len=64))
    is_refused(kv, static, "StaticCache")
    is_refused(kv, EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache")
    is_refused(kv, DynamicCache(config=model.config, offloading=True), "offloaded")
    quantized = QuantizedCache.__new__(QuantizedCache)
    is_refused(kv, quantized, "QuantizedCache")
    is_refused(kv, [(torch.zeros(1, 1, 20, 8), torch.zeros(1, 1, 20, 8))] * 2, "list")


def test_a_batch_is_refused(model: Any, memory_kv: Attach) -> None:
    is_refused(memory_kv(model), filled(model, DynamicCache(config=model.config), batch=2), "batch size 1")


def test_unknown_layers_are_refused(model: Any, memory_kv: Attach) -> None:
    class StrangeLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not checked
        pass

    kv = memory_kv(model)
    cache = filled(model, DynamicCache(config=model.config))
    strange = StrangeLayer()
    strange.lazy_initialization(cache.layers[1].keys, cache.layers[1].values)
    strange.keys, strange.values = cache.layers[1].keys, cache.layers[1].values
    cache.layers[1] = strange
    is_refused(kv, cache, "layer 1 is a StrangeLayer")


def test_layers_of_another_window_are_refused(memory_kv: Attach) -> None:
    types = ["sliding_attention", "full_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=12, layer_types=types)).eval()
    other = Gemma3TextConfig(**SIZES, sliding_window=14, layer_types=types)
    is_refused(memory_kv(model), filled(model, DynamicCache(config=other)), "window 14, not 12")
    # Without a config every layer is a full one.
    is_refused(memory_kv(model), filled(model, DynamicCache()), "should be a DynamicSlidingWindowLayer")


def test_empty_and_uneven_caches_are_refused(model: Any, memory_kv: Attach) -> None:
    kv = memory_kv(model)
    is_refused(kv, DynamicCache(config=model.config), "layer 0 is empty")
    uneven = filled(model, DynamicCache(config=model.config))
    uneven.layers[1].keys = uneven.layers[1].keys[:, :, :-1]
    uneven.layers[1].values = uneven.layers[1].values[:, :, :-1]
    is_refused(kv, uneven, "different numbers of tokens")
    torn = filled(model, DynamicCache(config=model.config))
    torn.layers[1].values = torn.layers[1].values[:, :, :-1]
    is_refused(kv, torn, "differ in length")


def test_other_dtypes_and_shapes_are_refused(model: Any, memory_kv: Attach) -> None:
    kv = memory_kv(model)
    cache = filled(model, DynamicCache(config=model.config))
    halved = cache.layers[0].keys.bfloat16()
    kept, cache.layers[0].keys = cache.layers[0].keys, halved
    is_refused(kv, cache, "bfloat16")
    cache.layers[0].keys = kept.repeat(1, 2, 1, 1)
    is_refused(kv, cache, "2 heads of 8, the config says 1 of 8")


def test_token_lists_must_cover_the_cache(model: Any, memory_kv: Attach) -> None:
    kv = memory_kv(model)
    cache = filled(model, DynamicCache(config=model.config))
    with pytest.raises(TokensError, match="19 token ids were given for a cache of 20"):
        kv.park("chat", list(range(19)), cache)
    assert kv.park("chat", list(range(25)), cache).result().tokens == 20
    with pytest.raises(TokensError, match="no tokens"):
        kv.restore("chat", [])
    assert kv.restore("chat", [1]).tokens == 0


def test_a_part_of_what_was_planned_is_a_front_or_a_miss(model: Any, memory_kv: Attach) -> None:
    kv = memory_kv(model, 16)
    worker: Any = kv.worker
    cache = filled(model, DynamicCache(config=model.config), tokens=50)
    kv.park("chat", list(range(50)), cache)
    worker.restored_at_most = 20
    cut = kv.restore("chat", [*range(50), 1])
    assert cut.tokens == cut.cache.get_seq_length() == 32 and cut.receipt.reason == "deadline"
    for before, after in zip(cache.layers, cut.cache.layers, strict=True):
        assert torch.equal(before.keys[:, :, :32], after.keys)


def test_a_cut_front_without_its_window_is_a_miss(memory_kv: Attach) -> None:
    types = ["sliding_attention", "full_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=12, layer_types=types)).eval()
    kv = memory_kv(model, 16)
    worker: Any = kv.worker
    kv.park("chat", list(range(60)), filled(model, DynamicCache(config=model.config), tokens=60))
    assert kv.restore("chat", [*range(60), 1]).tokens == 60
    worker.restored_at_most = 20
    # 32 tokens would need rows from 21 on, and only those from 48 on were loaded.
    cut = kv.restore("chat", [*range(60), 1])
    assert cut.tokens == 0 and cut.cache.get_seq_length() == 0


def bare(config: Any) -> Any:
    """As much of a model as `cache_shape` looks at."""
    return SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"))


def test_models_whose_cache_is_not_plain_are_refused_at_attach() -> None:
    with pytest.raises(GeometryError, match="latents"):
        cache_shape(bare(LlamaConfig(**SIZES, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4)), 16)
    narrow = Gemma3TextConfig(**SIZES, sliding_window=1, layer_types=["sliding_attention"] * 2)
    with pytest.raises(GeometryError, match="window of 1"):
        cache_shape(bare(narrow), 16)


def test_a_pattern_that_transformers_reads_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Gemma3TextConfig(**SIZES, sliding_window=12, layer_types=["sliding_attention", "full_attention"])
    assert [s.window_tokens for s in cache_shape(bare(config), 16).layers] == [12, 0]
    read = {**config.to_dict(), "layer_types": ["full_attention", "full_attention"]}
    monkeypatch.setattr(type(config), "to_dict", lambda self: read)
    with pytest.raises(GeometryError, match="layer 0 in a DynamicSlidingWindowLayer"):
        cache_shape(bare(config), 16)


def test_a_model_without_a_folder_needs_a_fingerprint(model: Any, tmp_path: Path) -> None:
    shape = cache_shape(model, 16)
    with pytest.raises(FingerprintError, match="not loaded from a folder"):
        model_fingerprint(model, shape)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    found = model_fingerprint(loaded, shape)
    assert found == model_fingerprint(loaded, shape)
    assert found != model_fingerprint(loaded, cache_shape(loaded.bfloat16(), 16))


def test_attach_shows_layout_fingerprint_shard_and_what_computes(model: Any) -> None:
    seen: dict[str, Any] = {}

    class Client:
        def attach(self, identity: Any, layout: Any, *, shard: Shard, **computing: Any) -> str:
            seen.update(identity=identity, layout=layout, shard=shard, **computing)
            return "worker"

    client: Any = Client()
    identity = Fingerprint(b"f" * 32, "mine")
    kv = attach(client, model, fingerprint=identity, block_tokens=32)
    worker: Any = kv.worker
    assert worker == "worker" and seen["identity"] is identity
    assert seen["layout"].geometry.block_tokens == 32
    # K and V, 2 layers, 1 head of 8 elements of 4 bytes.
    assert seen["layout"].geometry.groups[0].token_bytes == 2 * 2 * 8 * 4
    assert seen["shard"].name == "L0+2.H0+1"
    assert seen["config"]["intermediate_size"] == SIZES["intermediate_size"]
    assert (seen["device"], seen["devices"]) == ("", 1)
    attach(client, model, fingerprint=identity, config="folder", device="NVIDIA L4", devices=2)
    assert (seen["config"], seen["device"], seen["devices"]) == ("folder", "NVIDIA L4", 2)


def test_a_session_refuses_what_it_cannot_do(model: Any) -> None:
    chat = ChatSession(None, model, "chat", encode=lambda text: list(text.encode()), decode=str)
    with pytest.raises(TokensError):
        chat.send("", 3)
    with pytest.raises(TokensError):
        chat.send("hi", 0)
    with pytest.raises(TokensError, match="no KV"):
        chat.park()
    assert chat.tokens == [] and chat.cache is None


def test_an_error_on_the_way_leaves_the_transcript(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatSession(None, model, "chat", encode=lambda text: [ord(c) % 64 for c in text], decode=str)
    first = chat.send("hello", 3)
    before = list(chat.tokens)
    forward = chat._forward

    def fails(feed: Any, cache: Any) -> torch.Tensor:
        forward(feed, cache)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat, "_forward", fails)
    with pytest.raises(RuntimeError):
        chat.send("again", 3)
    assert chat.tokens == before and chat.cache is None
    monkeypatch.setattr(chat, "_forward", forward)
    assert chat.send("again", 3).cached_tokens == 0
    assert first.prompt_tokens == 5
