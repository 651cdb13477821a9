"""Shards: what each rank holds, which ranks hold the same, and how many bytes that is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import GeometryError
from kvtier.model.spec import ModelSpec
from kvtier.objects import Shard

LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
MLA = {**LLAMA3_8B, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
HYBRID = {
    **LLAMA3_8B,
    "num_key_value_heads": 2,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}
UNEVEN_HEADS = {
    **LLAMA3_8B,
    "num_key_value_heads": 16,
    "num_hidden_layers": 2,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 4,
}


def shards(spec, tp_size, pp_size=1):
    return [spec.shard_for(tp, tp_size, pp, pp_size) for pp in range(pp_size) for tp in range(tp_size)]


def bytes_of(spec, shard):
    geometry = spec.geometry(shard, 256, 16)
    return geometry.token_bytes + sum(g.state_bytes for g in geometry.groups)


def test_the_whole_shard_has_all_the_bytes():
    spec = ModelSpec.from_config(LLAMA3_8B)
    geometry = spec.geometry(None, 256, 16)
    assert geometry == spec.geometry(spec.whole_shard(), 256, 16)
    assert (geometry.token_bytes, geometry.block_tokens, geometry.page_tokens) == (131_072, 256, 16)
    assert spec.whole_shard().name == "L0+32.H0+8"


@given(tp_size=st.sampled_from([1, 2, 4, 8]), pp_size=st.sampled_from([1, 2, 4]), hybrid=st.booleans())
def test_split_shards_are_distinct_and_add_up(tp_size, pp_size, hybrid):
    config = {**HYBRID, "num_key_value_heads": 8} if hybrid else LLAMA3_8B
    spec = ModelSpec.from_config(config)
    ranks = shards(spec, tp_size, pp_size)
    assert len(set(ranks)) == tp_size * pp_size
    assert sum(bytes_of(spec, s) for s in ranks) == spec.bytes_per_token + spec.state_bytes


def test_replicated_heads_give_equal_shards():
    spec = ModelSpec.from_config(LLAMA3_8B)
    names = [s.name for s in shards(spec, 16)]
    assert names == [f"L0+32.H{head}+1" for head in range(8) for _ in range(2)]


def test_mla_is_equal_on_all_tensor_parallel_ranks():
    spec = ModelSpec.from_config(MLA)
    assert set(shards(spec, 8)) == {spec.whole_shard()}
    assert bytes_of(spec, spec.shard_for(3, 8)) == 576 * 2 * 32
    assert len(set(shards(spec, 8, pp_size=4))) == 4


def test_states_keep_shards_apart_where_kv_heads_are_replicated():
    spec = ModelSpec.from_config(HYBRID)
    ranks = shards(spec, 8)
    assert len(set(ranks)) == 8
    full, state = spec.geometry(ranks[3], 256, 16).groups
    assert full.token_bytes == spec.groups[0].token_bytes // 2
    assert state.state_bytes == spec.state_bytes // 8


def test_groups_with_fewer_heads_are_replicated_in_finer_slices():
    spec = ModelSpec.from_config(UNEVEN_HEADS)
    full, sliding = spec.geometry(spec.shard_for(5, 8), 256, 16).groups
    assert (full.token_bytes, sliding.token_bytes) == (2 * 128 * 2, 2 * 2 * 128 * 2)


def test_groups_keep_their_index_in_a_shard_without_their_layers():
    spec = ModelSpec.from_config(UNEVEN_HEADS)
    first = spec.geometry(spec.shard_for(0, 1, 0, 2), 256, 16)
    last = spec.geometry(spec.shard_for(0, 1, 1, 2), 256, 16)
    assert [g.kind for g in first.groups] == [g.kind for g in last.groups] == ["full", "sliding"]
    assert [g.token_bytes > 0 for g in first.groups] == [False, True]
    assert [g.token_bytes > 0 for g in last.groups] == [True, False]


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "message"),
    [(3, 1, "8 KV heads do not split over tp_size 3"), (12, 1, "tp_size 12"), (1, 5, "32 layers.*pp_size 5")],
)
def test_sizes_that_do_not_divide(tp_size, pp_size, message):
    with pytest.raises(GeometryError, match=message):
        ModelSpec.from_config(LLAMA3_8B).shard_for(0, tp_size, 0, pp_size)


@pytest.mark.parametrize("ranks", [(8, 8, 0, 1), (-1, 8, 0, 1), (0, 0, 0, 1), (0, 1, 2, 2)])
def test_ranks_outside_their_group(ranks):
    with pytest.raises(GeometryError, match="is not a rank"):
        ModelSpec.from_config(LLAMA3_8B).shard_for(*ranks)


@pytest.mark.parametrize(
    "shard", [Shard(0, 33, 0, 8), Shard(0, 32, 4, 5), Shard(-1, 2, 0, 8), Shard(0, 0, 0, 8)]
)
def test_shards_outside_the_model(shard):
    with pytest.raises(GeometryError, match="is not inside L0"):
        ModelSpec.from_config(LLAMA3_8B).geometry(shard, 256, 16)


def test_a_slice_through_heads_is_refused():
    with pytest.raises(GeometryError, match="cuts through"):
        ModelSpec.from_config(UNEVEN_HEADS).geometry(Shard(0, 2, 2, 4), 256, 16)


@pytest.mark.parametrize(("block", "page"), [(100, 16), (0, 16), (16, 0), (8, 16)])
def test_blocks_are_whole_pages(block, page):
    with pytest.raises(GeometryError, match="multiple of page_tokens"):
        ModelSpec.from_config(LLAMA3_8B).geometry(None, block, page)
