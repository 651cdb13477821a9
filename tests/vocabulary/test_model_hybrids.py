"""Models with layers that keep a state and no rows: which layers, and how many bytes a snapshot is."""

from kvtier.model.spec import ModelSpec

LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
MLA = {
    **LLAMA3_8B,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
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
JAMBA = {
    "model_type": "jamba",
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def spec_of(config, **changes):
    return ModelSpec.from_config({**config, **changes})


def test_qwen3_next_keeps_state_in_three_layers_of_four():
    spec = spec_of(QWEN3_NEXT, layer_types=[*["linear_attention"] * 3, "full_attention"] * 12)
    full, state = spec.groups
    assert full.token_bytes == spec.bytes_per_token == 12 * 2 * 2 * 256 * 2
    recurrent, convolution = 32 * 128 * 128, (2 * 16 * 128 + 32 * 128) * 3
    assert state.state_bytes == spec.state_bytes == 36 * (recurrent + convolution) * 2
    assert state.token_bytes == 0
    assert spec_of(QWEN3_NEXT, full_attention_interval=4) == spec


def test_a_named_state_dtype_counts_for_the_recurrence_alone():
    spec = spec_of(QWEN3_NEXT, full_attention_interval=4, mamba_ssm_dtype="float32")
    assert [p.dtype for p in spec.groups[1].state] == ["float32", "bfloat16", "bfloat16"]


def test_kv_dtype_does_not_change_states():
    quantized = ModelSpec.from_config({**QWEN3_NEXT, "full_attention_interval": 4}, kv_dtype="fp8")
    plain = spec_of(QWEN3_NEXT, full_attention_interval=4)
    assert quantized.bytes_per_token * 2 == plain.bytes_per_token
    assert quantized.state_bytes == plain.state_bytes


def test_jamba_has_one_attention_layer_in_eight():
    full, state = spec_of(JAMBA).groups
    assert full.layers == (4, 12, 20, 28)
    assert state.state_bytes == 28 * 8192 * (16 + 3) * 2


def test_nemotron_h_pattern_of_letters():
    spec = spec_of(
        LLAMA3_8B,
        model_type="nemotron_h",
        num_hidden_layers=6,
        hybrid_override_pattern="M-M*-E",
        mamba_num_heads=128,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        conv_kernel=4,
        mamba_ssm_cache_dtype="float32",
    )
    full, state = spec.groups
    assert (full.layers, state.layers) == ((3,), (0, 2))
    assert state.state_bytes == 2 * (128 * 64 * 128 * 4 + (128 * 64 + 2 * 8 * 128) * 3 * 2)


def test_kimi_linear_counts_its_full_layers_from_one():
    linear = {"full_attn_layers": [4, 8], "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4}
    spec = spec_of(MLA, model_type="kimi_linear", num_hidden_layers=8, linear_attn_config=linear)
    full, state = spec.groups
    assert (full.layers, full.key_dims) == ((3, 7), (512, 64))
    assert state.state_bytes == 6 * 32 * (128 * 128 + 3 * 128 * 3) * 2


def test_recurrent_gemma_keeps_local_attention_and_a_recurrence():
    config = {
        "model_type": "recurrent_gemma",
        "attention_window_size": 2048,
        "block_types": ["recurrent", "recurrent", "attention"],
        "conv1d_width": 4,
        "hidden_size": 2560,
        "intermediate_size": 15360,
        "lru_width": 2560,
        "num_attention_heads": 10,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "torch_dtype": "bfloat16",
    }
    sliding, state = ModelSpec.from_config(config).groups
    assert (sliding.window_tokens, sliding.layers) == (2048, tuple(range(2, 26, 3)))
    assert state.state_bytes == 18 * 2560 * (4 + 3 * 2)


def test_falcon_h1_keeps_both_in_every_layer():
    mamba = {"mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_d_ssm": 1024, "mamba_n_groups": 1}
    mamba |= {"mamba_d_state": 256, "mamba_d_conv": 4}
    full, state = spec_of(LLAMA3_8B, model_type="falcon_h1", **mamba).groups
    assert full.layers == state.layers == tuple(range(32))
    assert state.state_bytes == 32 * (128 * 8 * 256 + (1024 + 2 * 256) * 3) * 2


def test_short_convolutions_of_lfm2():
    names = ["conv", "conv", "full_attention"]
    full, state = spec_of(LLAMA3_8B, num_hidden_layers=3, layer_types=names, conv_L_cache=3).groups
    assert (full.layers, state.layers, state.state_bytes) == ((2,), (0, 1), 2 * 4096 * 2 * 2)
