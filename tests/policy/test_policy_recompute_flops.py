"""Operations of computing tokens again: known models, an explicit count, and identities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ModelSpecError
from kvtier.policy.recompute import Attention, ComputeSpec

LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA3_8B = {**LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA3_70B = {
    **LLAMA3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
MIXTRAL = {
    **LLAMA3_8B,
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8"},
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
GEMMA3_27B = {
    "model_type": "gemma3_text",
    "head_dim": 128,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "sliding_window": 1024,
    "torch_dtype": "bfloat16",
    "vocab_size": 262208,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 512,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "torch_dtype": "float32",
    "vocab_size": 50257,
}
# Published weights that a token passes through; how many embedding-sized matrices these count.
PUBLISHED = [
    (LLAMA2_7B, 6.74e9, 2),
    (LLAMA3_8B, 8.03e9, 2),
    (LLAMA3_70B, 70.6e9, 2),
    (MIXTRAL, 12.9e9, 2),
    (DEEPSEEK_V3, 37e9, 1),
    (GEMMA3_27B, 27.0e9, 1),
    (QWEN3_30B_A3B, 3.3e9, 2),
    (GPT2, 124e6, 1),
]


@pytest.mark.parametrize(("config", "published", "embeddings"), PUBLISHED, ids=lambda x: str(x)[:30])
def test_two_operations_for_each_published_weight(config, published, embeddings):
    spec = ComputeSpec.from_config(config)
    hidden = config.get("hidden_size") or config["n_embd"]
    weights = spec.token_weights + embeddings * hidden * config["vocab_size"]
    assert weights == pytest.approx(published, rel=0.03)


def test_a_hybrid_is_near_what_its_name_says():
    # 80B-A3B: three quarters of its layers are recurrent.
    assert ComputeSpec.from_config(QWEN3_NEXT).token_weights == pytest.approx(3e9, rel=0.1)


def counted(config, past, new):
    """The matrix products of a dense GQA model, one by one."""
    d, h, f = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    kv, dim = config.get("num_key_value_heads", h), config.get("head_dim", d // h)
    window, every = config.get("sliding_window"), config.get("sliding_window_pattern", 6)
    total = 0
    for layer in range(config["num_hidden_layers"]):
        sliding = window and (layer + 1) % every
        for position in range(past, past + new):
            for rows, columns in ((d, h * dim), (d, kv * dim), (d, kv * dim), (h * dim, d)):
                total += 2 * rows * columns
            keys = min(position + 1, window) if sliding else position + 1
            total += 2 * h * dim * keys + 2 * h * keys * dim
            total += 2 * d * f * 3
    return total + 2 * d * config["vocab_size"]


@pytest.mark.parametrize("config", [LLAMA2_7B, LLAMA3_8B, GEMMA3_27B])
@pytest.mark.parametrize(("past", "new"), [(0, 1), (0, 700), (1000, 300), (1023, 2), (3000, 17)])
def test_the_formula_is_the_sum_over_all_products(config, past, new):
    small = {**config, "num_hidden_layers": 6}
    assert ComputeSpec.from_config(small).flops(past, new) == counted(small, past, new)


def test_the_count_sees_a_wrong_window():
    small = {**GEMMA3_27B, "num_hidden_layers": 6}
    wrong = {**small, "sliding_window": 512}
    assert ComputeSpec.from_config(wrong).flops(1000, 300) != counted(small, 1000, 300)


def test_the_formula_of_the_design_for_full_layers():
    spec = ComputeSpec.from_config(LLAMA3_8B)
    p, n, d, h, dh, kv, f = 20_000, 4_000, 4096, 32, 128, 8, 14336
    design = 32 * (2 * n * (2 * d * h * dh + 2 * d * kv * dh + 3 * d * f) + 4 * h * dh * (n * p + n * n / 2))
    assert spec.flops(p, n) == pytest.approx(design + spec.head_flops, rel=1e-4)


def test_mla_expands_the_latents_that_are_in_the_cache_once_for_each_call():
    spec = ComputeSpec.from_config(DEEPSEEK_V3)
    assert spec.past_flops == 61 * 2 * 512 * 128 * (128 + 128)
    assert spec.attention == (Attention(61 * 128 * (2 * 192 + 2 * 128)),)
    halves = spec.flops(0, 500) + spec.flops(500, 500)
    assert halves - spec.flops(0, 1000) == pytest.approx(500 * spec.past_flops + spec.head_flops)


@given(
    st.sampled_from([LLAMA3_8B, GEMMA3_27B, QWEN3_NEXT]),
    st.integers(0, 9000),
    st.integers(1, 9000),
    st.data(),
)
def test_a_prefill_in_parts_costs_the_same_but_for_the_head(config, past, new, data):
    spec = ComputeSpec.from_config(config)
    first = data.draw(st.integers(1, new))
    parts = spec.flops(past, first) + spec.flops(past + first, new - first)
    extra = spec.head_flops if first < new else 0.0
    assert parts - extra == pytest.approx(spec.flops(past, new), rel=1e-12)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 200))
def test_pairs_are_counted_one_by_one(past, new, window):
    by_hand = sum(min(i + 1, window) if window else i + 1 for i in range(past, past + new))
    assert Attention(1.0, window).pairs(past, new) == by_hand


def test_layers_that_share_kv_compute_all_the_same():
    shared = {**LLAMA3_8B, "num_kv_shared_layers": 8}
    assert ComputeSpec.from_config(shared).flops(10, 10) == pytest.approx(
        ComputeSpec.from_config(LLAMA3_8B).flops(10, 10)
    )


def test_nothing_costs_nothing_and_nonsense_is_refused():
    spec = ComputeSpec.from_config(LLAMA3_8B)
    assert spec.flops(1000, 0) == 0
    for past, new in ((-1, 5), (5, -1)):
        with pytest.raises(ValueError, match="negative"):
            spec.flops(past, new)
    with pytest.raises(ModelSpecError, match="no layer has experts"):
        ComputeSpec.from_config({**MIXTRAL, "mlp_only_layers": list(range(32))})
