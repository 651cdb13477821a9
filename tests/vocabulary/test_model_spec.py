"""Known sizes of public models, and the ways in which configs write down their layer patterns."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.model.spec import ModelSpec, size_report

LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA3_8B = {
    **LLAMA2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B = {**LLAMA3_8B, "model_type": "mistral", "sliding_window": 4096, "vocab_size": 32000}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8"},
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "num_hidden_layers": 34,
    "sliding_window": 1024,
    "torch_dtype": "bfloat16",
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "head_dim": 256,
    "hidden_size": 2048,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 512,
    "torch_dtype": "bfloat16",
}
LLAMA4 = {
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "llama4_text",
        "attention_chunk_size": 8192,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
    },
}
MHA_80 = {
    **LLAMA2_7B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "multi_query": True,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
    "torch_dtype": "bfloat16",
}


def spec_of(config, **changes):
    return ModelSpec.from_config({**config, **changes})


@pytest.mark.parametrize(
    ("config", "bytes_per_token"),
    [
        (LLAMA2_7B, 524_288),
        (LLAMA3_8B, 131_072),
        (MISTRAL_7B, 131_072),
        (MHA_80, 2_621_440),
        ({**MHA_80, "num_key_value_heads": 8}, 327_680),
        ({**MHA_80, "num_key_value_heads": 1}, 40_960),
        (DEEPSEEK_V3, 70_272),
        (GEMMA3, 34 * 2 * 4 * 256 * 2),
        (FALCON_7B, 32 * 2 * 64 * 2),
    ],
)
def test_known_bytes_per_token(config, bytes_per_token):
    assert spec_of(config).bytes_per_token == bytes_per_token


@pytest.mark.parametrize(
    ("kv_dtype", "bytes_per_token"),
    [
        ("fp32", 262_144),
        ("bfloat16", 131_072),
        ("fp16", 131_072),
        ("fp8_e4m3", 65_536),
        ("fp8_e5m2", 65_536),
        ("int8", 65_536),
    ],
)
def test_kv_dtype_overrides_the_models(kv_dtype, bytes_per_token):
    assert ModelSpec.from_config(LLAMA3_8B, kv_dtype=kv_dtype).bytes_per_token == bytes_per_token


def test_mla_keeps_one_latent_and_one_rope_key():
    (group,) = spec_of(DEEPSEEK_V3).groups
    assert (group.kv_heads, group.key_dims, group.value_dims, group.is_latent) == (1, (512, 64), (), True)


def test_numbers_for_the_cost_of_recomputing():
    llama = spec_of(LLAMA3_8B)
    assert (llama.layers, llama.hidden_size, llama.attention_heads) == (32, 4096, 32)
    assert (llama.head_dim, llama.kv_heads, llama.intermediate_size) == (128, 8, 14336)
    deepseek = spec_of(DEEPSEEK_V3)
    assert (deepseek.head_dim, deepseek.kv_heads, deepseek.intermediate_size) == (192, 128, 9 * 2048)
    assert spec_of(QWEN3_NEXT, full_attention_interval=4).intermediate_size == 11 * 512


def test_gemma3_pattern_and_explicit_types_give_one_spec():
    names = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)]
    explicit = spec_of(GEMMA3, layer_types=names)
    full, sliding = explicit.groups
    assert (full.kind, full.layers) == ("full", (5, 11, 17, 23, 29))
    assert (sliding.kind, len(sliding.layers), sliding.window_tokens) == ("sliding", 29, 1024)
    assert explicit == spec_of(GEMMA3, sliding_window_pattern=6) == spec_of(GEMMA3)


def test_gemma3_as_published_leaves_its_heads_to_the_models_code():
    published = {
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
        "vision_config": {"num_hidden_layers": 27, "num_attention_heads": 16, "hidden_size": 1152},
    }
    assert ModelSpec.from_config(published).groups == spec_of(GEMMA3).groups


def test_gemma2_alternates_from_a_sliding_layer():
    spec = spec_of(GEMMA3, model_type="gemma2", num_hidden_layers=26, sliding_window=4096)
    assert [g.layers for g in spec.groups] == [tuple(range(1, 26, 2)), tuple(range(0, 26, 2))]


def test_mistral_stops_growing_at_its_window():
    spec = spec_of(MISTRAL_7B)
    at_window = 4095 * 131_072
    assert spec.conversation_bytes(4094) == 4094 * 131_072
    assert spec.conversation_bytes(4095) == at_window
    assert spec.conversation_bytes(4096) == spec.conversation_bytes(1_000_000) == at_window


def test_no_window_means_no_limit():
    spec = spec_of(MISTRAL_7B, sliding_window=None)
    assert spec.conversation_bytes(100_000) == 100_000 * 131_072
    assert spec.groups[0].kind == "full"


@given(tokens=st.integers(0, 200_000), window=st.integers(1, 5000))
def test_kept_tokens_agree_with_the_geometry(tokens, window):
    spec = spec_of(MISTRAL_7B, sliding_window=window)
    geometry = spec.geometry(None, 256, 16).groups[0]
    kept = tokens - geometry.needed_from(tokens)
    assert spec.conversation_bytes(tokens) == geometry.token_bytes * kept
    assert kept == min(tokens, window - 1)


QWEN2 = {**LLAMA3_8B, "model_type": "qwen2", "sliding_window": 131072, "max_window_layers": 28}


def test_qwen_slides_only_when_told_to_and_only_in_the_upper_layers():
    off = spec_of(QWEN2, use_sliding_window=False)
    assert [g.kind for g in off.groups] == ["full"]
    assert spec_of(QWEN2) == off
    on = spec_of(QWEN2, use_sliding_window=True)
    assert [(g.kind, g.layers) for g in on.groups] == [
        ("full", tuple(range(28))),
        ("sliding", (28, 29, 30, 31)),
    ]


def test_llama4_chunks_are_windows_except_in_every_fourth_layer():
    spec = ModelSpec.from_config(LLAMA4)
    full, chunked = spec.groups
    assert full.layers == tuple(range(3, 48, 4))
    assert (chunked.kind, chunked.window_tokens, len(chunked.layers)) == ("sliding", 8192, 36)
    explicit = ["full_attention" if i % 4 == 3 else "chunked_attention" for i in range(48)]
    text = {**LLAMA4["text_config"], "layer_types": explicit}
    assert ModelSpec.from_config({**LLAMA4, "text_config": text}) == spec


def test_a_window_of_the_chunks_size_covers_a_chunk():
    chunk = 8
    spec = ModelSpec.from_config(
        {**LLAMA4, "text_config": {**LLAMA4["text_config"], "attention_chunk_size": chunk}}
    )
    sliding = spec.geometry(None, 16, 16).groups[1]
    assert all(sliding.needed_from(n) <= n // chunk * chunk for n in range(100))


def test_layers_that_share_earlier_kv_keep_none():
    names = [*["sliding_attention"] * 4, "full_attention"] * 7
    spec = spec_of(GEMMA3, num_hidden_layers=35, layer_types=names, num_kv_shared_layers=15)
    assert [max(g.layers) for g in spec.groups] == [19, 18]
    assert sum(len(g.layers) for g in spec.groups) == 20
    assert spec.layers == 35


def test_full_layers_with_other_heads():
    names = ["sliding_attention", "full_attention"]
    own_keys = spec_of(
        GEMMA3,
        num_hidden_layers=2,
        layer_types=names,
        global_head_dim=512,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
    )
    assert [(g.kv_heads, g.key_dims) for g in own_keys.groups] == [(2, (512,)), (4, (256,))]
    by_layer = {"01": {"head_dim": 512, "num_key_value_heads": 2}}
    assert spec_of(GEMMA3, num_hidden_layers=2, layer_types=names, per_layer_config=by_layer) == own_keys


def test_names_of_older_configs():
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "torch_dtype": "float32",
    }
    spec = ModelSpec.from_config(gpt2)
    assert spec.bytes_per_token == 12 * 2 * 768 * 4
    assert spec.intermediate_size == 4 * 768


def test_reads_files_and_folders(tmp_path):
    folder = tmp_path / "models--acme--small" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B))
    spec = ModelSpec.from_config(folder)
    assert spec == ModelSpec.from_config(str(folder / "config.json")) == ModelSpec.from_config(LLAMA3_8B)
    assert spec.name == "acme/small"


def test_size_report_adds_up_and_is_json():
    spec = spec_of(GEMMA3)
    report = size_report(spec, 32768, 256)
    as_dict = json.loads(json.dumps(report.as_dict()))
    full, sliding = as_dict["groups"]
    assert full == {
        "kind": "full",
        "layers": 5,
        "window_tokens": 0,
        "bytes_per_token": 5 * 4096,
        "kept_tokens": 32768,
        "block_bytes": 256 * 5 * 4096,
        "state_bytes": 0,
        "conversation_bytes": 32768 * 5 * 4096,
    }
    assert (sliding["kept_tokens"], sliding["conversation_bytes"]) == (1023, 1023 * 29 * 4096)
    for total in ("bytes_per_token", "block_bytes", "state_bytes", "conversation_bytes"):
        assert as_dict[total] == full[total] + sliding[total]


def test_size_report_counts_a_snapshot_once():
    spec = spec_of(QWEN3_NEXT, full_attention_interval=4)
    short, long = size_report(spec, 1, 256), size_report(spec, 1000, 256)
    assert long.groups[1].conversation_bytes == short.groups[1].conversation_bytes == spec.state_bytes
    assert long.block_bytes == 256 * spec.bytes_per_token
