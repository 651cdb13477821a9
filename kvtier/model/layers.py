"""Which layer keeps what: reads the many ways in which configs write down a layer pattern.

The first rule that applies wins: an explicit list of layer types, then a family's own pattern keys, then the
sliding-window keys, then full attention everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from kvtier.errors import ModelSpecError
from kvtier.geometry import GroupKind
from kvtier.model.config_json import ConfigReader
from kvtier.model.groups import LayerGroup
from kvtier.model.state import has_state_keys, state_parts

# (kind, window): what one layer keeps. Most layers keep one thing, MLP-only layers none, Falcon-H1's two.
Keeps: TypeAlias = tuple[GroupKind, int]

# (KV heads, dims of a head's key rows, dims of its value rows).
RowShape: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]

_FULL: Keeps = ("full", 0)
_STATE: Keeps = ("state", 0)
_FULL_NAMES = frozenset({"full_attention", "attention"})
_STATE_NAMES = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "conv"})
_NOTHING_NAMES = frozenset({"mlp", "moe"})
_NEMOTRON_NAMES = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_KIND_ORDER: dict[GroupKind, int] = {"full": 0, "sliding": 1, "state": 2}


def layer_count(config: ConfigReader) -> int:
    """Number of decoder layers; multi-token-prediction layers are not counted."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    explicit = config.optional_count(*names)
    pattern = config.get("layers_block_type", "layer_types", "hybrid_override_pattern")
    return len(pattern) if explicit is None and pattern else config.count(*names)


def layer_groups(config: ConfigReader, dtype: str, state_dtype: str) -> tuple[LayerGroup, ...]:
    """The model's layer groups: full, then sliding, then state, each kind in the order of first layers.

    dtype: of KV rows.  state_dtype: of snapshots, where the config names none.  Raises ModelSpecError.
    """
    layers = layer_count(config)
    keeps = _layer_keeps(config, layers)
    # Layers that reuse an earlier layer's KV keep none of their own (Gemma 3n, Gemma 4).
    owning = layers - config.zero_or_count("num_kv_shared_layers")
    members: dict[LayerGroup, list[int]] = {}
    for layer, kept in enumerate(keeps[:owning]):
        for kind, window in kept:
            if kind == "state":
                shape = LayerGroup("state", (), dtype, state=state_parts(config, state_dtype))
            else:
                kv_heads, key_dims, value_dims = _row_shape(config, layer, kind)
                shape = LayerGroup(kind, (), dtype, kv_heads, key_dims, value_dims, window)
            members.setdefault(shape, []).append(layer)
    if not members:
        raise ModelSpecError(f"{config.where}: no layer keeps any KV or state", fix="check the layer pattern")
    groups = [
        LayerGroup(g.kind, tuple(at), g.dtype, g.kv_heads, g.key_dims, g.value_dims, g.window_tokens, g.state)
        for g, at in members.items()
    ]
    return tuple(sorted(groups, key=lambda g: (_KIND_ORDER[g.kind], g.layers[0])))


def _layer_keeps(config: ConfigReader, layers: int) -> list[tuple[Keeps, ...]]:
    if config.model_type == "falcon_h1":
        return [(_FULL, _STATE)] * layers
    names = _explicit_names(config, layers)
    if names is not None:
        return [_keeps_of_name(config, name) for name in names]
    if has_state_keys(config):
        raise ModelSpecError(
            f"{config.where} describes state layers, but not which layers they are",
            fix="add layer_types, a list with one name for each layer",
        )
    return [(k,) for k in _sliding_pattern(config, layers)]


def _explicit_names(config: ConfigReader, layers: int) -> list[str] | None:
    """Layer type names from the config's own list or from a family's pattern keys; None when it has none."""
    listed = config.get("layer_types", "layers_block_type")
    if listed is not None:
        return _checked_length(config, [str(n) for n in listed], layers)
    nemotron = config.get("hybrid_override_pattern")
    if nemotron is not None:
        return _checked_length(config, [_NEMOTRON_NAMES.get(c, c) for c in nemotron], layers)
    if config.model_type == "recurrent_gemma":
        blocks = config.get("block_types") or ["recurrent", "recurrent", "attention"]
        # Its attention blocks are always local.
        local = ["sliding_attention" if b == "attention" else str(b) for b in blocks]
        return [local[i % len(local)] for i in range(layers)]
    full = _full_attention_layers(config, layers)
    return None if full is None else ["attention" if i in full else "mamba" for i in range(layers)]


def _full_attention_layers(config: ConfigReader, layers: int) -> set[int] | None:
    """Indices of the attention layers of a hybrid whose other layers keep state; None for other models."""
    if config.has("attn_layer_indices", "full_attn_idxs"):
        return set(config.integers("attn_layer_indices", "full_attn_idxs"))
    if config.has("linear_attn_config"):
        # Kimi counts layers from one.
        return {i - 1 for i in config.section("linear_attn_config").integers("full_attn_layers")}
    if config.has("attn_type_list"):
        return {i for i, full in enumerate(config.integers("attn_type_list")) if full}
    if config.has("attn_layer_period"):
        offset = config.zero_or_count("attn_layer_offset")
        return {i for i in range(layers) if i % config.count("attn_layer_period") == offset}
    if config.has("full_attention_interval"):
        return {i for i in range(layers) if (i + 1) % config.count("full_attention_interval") == 0}
    return None


def _checked_length(config: ConfigReader, names: list[str], layers: int) -> list[str]:
    if len(names) != layers:
        raise ModelSpecError(
            f"{config.where}: the layer pattern has {len(names)} entries, num_hidden_layers is {layers}",
            fix="make them agree",
        )
    return names


def _keeps_of_name(config: ConfigReader, name: str) -> tuple[Keeps, ...]:
    if name in _FULL_NAMES:
        return (_FULL,)
    if name == "sliding_attention":
        return (("sliding", config.count("sliding_window", "attention_window_size")),)
    if name == "chunked_attention":
        # A token of a chunk attends to its chunk's start at most, so a window of the chunk's size covers it.
        return (("sliding", config.count("attention_chunk_size")),)
    if name in _STATE_NAMES:
        return (_STATE,)
    if name in _NOTHING_NAMES:
        return ()
    known = sorted(_FULL_NAMES | _STATE_NAMES | _NOTHING_NAMES | {"sliding_attention", "chunked_attention"})
    problem = f"{config.where}: unknown layer type {name!r}"
    raise ModelSpecError(problem, fix=f"kvtier knows {', '.join(known)}")


def _sliding_pattern(config: ConfigReader, layers: int) -> list[Keeps]:
    """The pattern of a model that has attention in every layer and lists no layer types."""
    chunk = config.optional_count("attention_chunk_size")
    if chunk is not None:
        rope = config.get("no_rope_layers") or _llama4_rope_layers(config, layers)
        return [("sliding", chunk) if r else _FULL for r in rope]
    if config.get("use_sliding_window") is False or not config.get("sliding_window"):
        return [_FULL] * layers
    local: Keeps = ("sliding", config.count("sliding_window"))
    every = config.optional_count("sliding_window_pattern", "_sliding_window_pattern")
    if every is not None:
        return [_FULL if (i + 1) % every == 0 else local for i in range(layers)]
    if config.get("use_sliding_window") is True and config.get("max_window_layers") is None:
        raise ModelSpecError(
            f"{config.where}: use_sliding_window is true, max_window_layers is missing",
            fix="add max_window_layers: how many of the first layers keep full attention",
        )
    first_local = config.zero_or_count("max_window_layers")
    return [_FULL if i < first_local else local for i in range(layers)]


def _llama4_rope_layers(config: ConfigReader, layers: int) -> list[int]:
    """1 where a layer uses RoPE, which are the chunked ones; every 4th layer does not."""
    interval = config.optional_count("no_rope_layer_interval") or 4
    return [int((i + 1) % interval != 0) for i in range(layers)]


def _row_shape(config: ConfigReader, layer: int, kind: GroupKind) -> RowShape:
    """The rows that one attention layer keeps for a token."""
    latent = config.optional_count("kv_lora_rank")
    if latent is not None:
        return 1, (latent, config.count("qk_rope_head_dim")), ()
    kv_heads, key_dim = kv_head_count(config), config.head_dim()
    value_dim = config.optional_count("v_head_dim")
    if kind == "full":
        key_dim = config.optional_count("global_head_dim") or key_dim
        if config.get("attention_k_eq_v"):
            kv_heads = config.optional_count("num_global_key_value_heads") or kv_heads
    override = _layer_override(config, layer)
    key_dim = override.optional_count("head_dim") or key_dim
    kv_heads = override.optional_count("num_key_value_heads") or kv_heads
    return kv_heads, (key_dim,), (value_dim or key_dim,)


def _layer_override(config: ConfigReader, layer: int) -> ConfigReader:
    """What `per_layer_config` says of one layer. Raises ModelSpecError for more than head shapes."""
    by_layer: Any = config.get("per_layer_config") or {}
    entry: Any = next((v for k, v in by_layer.items() if int(k) == layer), {})
    if not isinstance(entry, Mapping) or set(entry) - {"head_dim", "num_key_value_heads"}:
        raise ModelSpecError(
            f"{config.where}: per_layer_config of layer {layer} is {entry!r}",
            fix="only head_dim and num_key_value_heads are understood there",
        )
    return ConfigReader(entry, f"{config.where}: per_layer_config")


def kv_head_count(config: ConfigReader) -> int:
    """KV heads of an attention layer. Raises ModelSpecError when they do not divide the attention heads."""
    heads = config.count("num_attention_heads", "n_head", "n_heads")
    # Falcon's multi_query means one KV head, whatever num_kv_heads says, except in its newer architecture.
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    kv_heads = config.optional_count("num_key_value_heads", "num_kv_heads", "multi_query_group_num") or heads
    if config.has("attn_config"):
        kv_heads = config.section("attn_config").optional_count("kv_n_heads") or kv_heads
    if heads % kv_heads:
        raise ModelSpecError(
            f"{config.where}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}",
            fix="correct one of them",
        )
    return kv_heads
