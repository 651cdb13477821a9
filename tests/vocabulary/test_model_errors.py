"""What a config can lack or contradict: each error names the key, and most of them the fix."""

import pytest

from kvtier.errors import GeometryError, ModelSpecError
from kvtier.model.spec import ModelSpec, size_report

GOOD = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ModelSpecError, match=f"{key} is missing.*add {key}"):
        ModelSpec.from_config({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_dtype": None}, r"dtype \(or torch_dtype\) is missing.*kv_dtype"),
        ({"torch_dtype": "auto"}, r"dtype \(or torch_dtype\) is missing"),
        ({"torch_dtype": "float12"}, "unknown dtype 'float12'.*bfloat16"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_key_value_heads": [1, 2]}, r"num_key_value_heads is \[1, 2\].*positive integer"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4.*head_dim"),
        ({"layer_types": ["full_attention"]}, "1 entries, num_hidden_layers is 4"),
        ({"layer_types": ["magic"] * 4}, "unknown layer type 'magic'.*sliding_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window is missing"),
        ({"layer_types": ["chunked_attention"] * 4}, "attention_chunk_size is missing"),
        ({"layer_types": ["linear_attention"] * 4}, "unknown family"),
        ({"layer_types": ["mlp"] * 4}, "no layer keeps any KV"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"sliding_window": 8, "use_sliding_window": True}, "max_window_layers is missing"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
        ({"mamba_d_state": 16}, "not which layers they are.*layer_types"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"cross_attention_layers": [1]}, "cross_attention_layers"),
        ({"index_head_dim": 128}, "index_head_dim"),
        ({"per_layer_config": {"1": {"sliding_window": 4}}}, "per_layer_config of layer 1"),
        ({"linear_attn_config": 5}, "linear_attn_config is 5.*JSON object"),
        ({"attn_layer_indices": "all"}, "attn_layer_indices is 'all'.*list of integers"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "kv_cache_scheme.*kv_dtype"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ModelSpecError, match=message):
        ModelSpec.from_config({**GOOD, **changes})


def test_the_good_config_is_good():
    assert ModelSpec.from_config(GOOD).bytes_per_token == 4 * 2 * 64 * 2


def test_a_kv_dtype_answers_for_a_missing_or_doubtful_one():
    doubtful = {**GOOD, "torch_dtype": None, "quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}
    assert ModelSpec.from_config(doubtful, kv_dtype="fp8_e4m3").bytes_per_token == 4 * 2 * 64


def test_the_section_is_named():
    with pytest.raises(ModelSpecError, match="text_config: hidden_size is missing"):
        ModelSpec.from_config({"text_config": {k: v for k, v in GOOD.items() if k != "hidden_size"}})


def test_files_that_are_no_configs(tmp_path):
    with pytest.raises(ModelSpecError, match="cannot read"):
        ModelSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelSpecError, match="is not JSON"):
        ModelSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelSpecError, match="is not JSON"):
        ModelSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelSpecError, match="no JSON object"):
        ModelSpec.from_config(tmp_path)


@pytest.mark.parametrize(("tokens", "block_tokens"), [(-1, 256), (10, 0)])
def test_sizes_of_nothing(tokens, block_tokens):
    with pytest.raises(GeometryError):
        size_report(ModelSpec.from_config(GOOD), tokens, block_tokens)
