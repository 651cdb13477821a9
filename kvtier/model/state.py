"""What a layer without KV rows keeps: the snapshot of linear attention, Mamba and other recurrences.

A causal convolution of width K needs the K-1 inputs before the next one, so K-1 columns are counted, also
where an engine's own buffer has K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from kvtier.errors import ModelSpecError
from kvtier.model.config_json import ConfigReader
from kvtier.model.groups import StatePart, dtype_name


def has_state_keys(config: ConfigReader) -> bool:
    """Whether the config describes a recurrence, so that some of its layers must keep state."""
    return any(config.has(*keys) for keys, _ in _FAMILIES)


def state_parts(config: ConfigReader, dtype: str) -> tuple[StatePart, ...]:
    """The parts of one state layer's snapshot. `dtype`: of the model, for all that the config does not name.

    Raises ModelSpecError when the config has none of the known families' keys.
    """
    recurrent_dtype = dtype_name(config.get("mamba_ssm_dtype", "mamba_ssm_cache_dtype") or dtype)
    for keys, family in _FAMILIES:
        if config.has(*keys):
            return family(config, dtype, recurrent_dtype)
    if config.model_type.startswith("minimax"):
        heads, dim = config.count("num_attention_heads"), config.head_dim()
        return (StatePart("linear", heads, dim * dim, recurrent_dtype),)
    raise ModelSpecError(
        f"{config.where} has state layers (linear attention or recurrent) of an unknown family,"
        f" model_type {config.model_type!r}",
        fix="kvtier knows gated delta nets, Kimi delta attention, Mamba 1 and 2, LFM2, RG-LRU and MiniMax",
    )


def _gated_delta_net(config: ConfigReader, dtype: str, recurrent_dtype: str) -> tuple[StatePart, ...]:
    key_heads, value_heads = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    key_dim, value_dim = config.count("linear_key_head_dim"), config.count("linear_value_head_dim")
    columns = config.count("linear_conv_kernel_dim") - 1
    return (
        StatePart("recurrent", value_heads, key_dim * value_dim, recurrent_dtype),
        StatePart("conv_query_key", key_heads, 2 * key_dim * columns, dtype),
        StatePart("conv_value", value_heads, value_dim * columns, dtype),
    )


def _kimi_delta_attention(config: ConfigReader, dtype: str, recurrent_dtype: str) -> tuple[StatePart, ...]:
    config = config.section("linear_attn_config") if config.has("linear_attn_config") else config
    heads, dim = config.count("linear_num_heads", "num_heads"), config.count("linear_head_dim", "head_dim")
    columns = config.count("linear_conv_kernel_dim", "short_conv_kernel_size") - 1
    return (
        StatePart("recurrent", heads, dim * dim, recurrent_dtype),
        StatePart("conv", heads, 3 * dim * columns, dtype),
    )


def _mamba2(config: ConfigReader, dtype: str, recurrent_dtype: str) -> tuple[StatePart, ...]:
    heads = config.count("mamba_n_heads", "mamba_num_heads")
    if config.get("mamba_d_head", "mamba_head_dim") in (None, "auto"):
        inner = config.optional_count("mamba_d_ssm")
        dim = (inner or config.count("mamba_expand") * config.count("hidden_size")) // heads
    else:
        dim = config.count("mamba_d_head", "mamba_head_dim")
    groups = config.count("mamba_n_groups", "n_groups")
    state = config.count("mamba_d_state", "ssm_state_size")
    columns = config.count("mamba_d_conv", "conv_kernel") - 1
    return (
        StatePart("ssm", heads, dim * state, recurrent_dtype),
        StatePart("conv_input", heads, dim * columns, dtype),
        StatePart("conv_groups", groups, 2 * state * columns, dtype),
    )


def _mamba1(config: ConfigReader, dtype: str, recurrent_dtype: str) -> tuple[StatePart, ...]:
    channels = config.count("mamba_expand") * config.count("hidden_size")
    return (
        StatePart("ssm", channels, config.count("mamba_d_state"), recurrent_dtype),
        StatePart("conv", channels, config.count("mamba_d_conv") - 1, dtype),
    )


def _short_conv(config: ConfigReader, dtype: str, _recurrent_dtype: str) -> tuple[StatePart, ...]:
    return (StatePart("conv", config.count("hidden_size"), config.count("conv_L_cache") - 1, dtype),)


def _rg_lru(config: ConfigReader, dtype: str, _recurrent_dtype: str) -> tuple[StatePart, ...]:
    """RecurrentGemma: one fp32 value and some past inputs for each channel of the linear recurrence."""
    channels = config.optional_count("lru_width") or config.count("hidden_size")
    return (
        StatePart("recurrent", channels, 1, "float32"),
        StatePart("conv", channels, config.count("conv1d_width") - 1, dtype),
    )


_Family: TypeAlias = Callable[[ConfigReader, str, str], tuple[StatePart, ...]]

# The keys that tell a family, and its reader: (config, model dtype, dtype of the recurrence) -> parts.
_FAMILIES: tuple[tuple[tuple[str, ...], _Family], ...] = (
    (("linear_num_value_heads",), _gated_delta_net),
    (("linear_num_heads", "linear_attn_config"), _kimi_delta_attention),
    (("mamba_n_heads", "mamba_num_heads"), _mamba2),
    (("mamba_d_state",), _mamba1),
    (("conv_L_cache",), _short_conv),
    (("conv1d_width",), _rg_lru),
)
