"""How many floating-point operations it takes to compute tokens again, from a model's config.json.

    F(p, n) = n * token_flops + p * past_flops + sum of pair_flops * pairs(p, n, window) + head_flops

Two operations for each weight that a token passes through (Kaplan et al., "Scaling Laws for Neural Language
Models", 2020, section 2.1), and for each pair of a query and a key that it may see 2 d_qk + 2 d_v for each
head: what a kernel that skips masked tiles computes (Dao, "FlashAttention-2", 2023, counts causal attention
so). Norms, rotary positions, softmax and activations are not counted: the achieved rate absorbs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvtier.errors import ModelSpecError
from kvtier.model.config_json import ConfigReader, text_reader
from kvtier.model.groups import LayerGroup
from kvtier.model.spec import ModelSpec

# MLPs of two matrices; all other families that are read have a gate beside them.
_UNGATED = frozenset({"gpt2", "gpt_neox", "gpt_bigcode", "gptj", "opt", "falcon", "bloom", "mpt", "phi"})
_UNGATED_ACTIVATIONS = frozenset({"relu2"})
# A recurrence reads, decays and writes its state: about three multiply-adds for each element and token.
_STATE_FLOPS = 6


@dataclass(frozen=True, slots=True)
class Attention:
    """Layers whose queries see the same keys. window_tokens: 0 when they see all that came before.

    pair_flops: of one query and one key, over all heads and all these layers.
    """

    pair_flops: float
    window_tokens: int = 0

    def pairs(self, past: int, new: int) -> int:
        """Pairs of a query in [past, past + new) and a key that it sees, itself included."""
        end = past + new
        if not self.window_tokens:
            return _triangle(end) - _triangle(past)
        window = self.window_tokens
        edge = min(max(window, past), end)
        return _triangle(edge) - _triangle(min(past, edge)) + (end - edge) * window


@dataclass(frozen=True, slots=True)
class ComputeSpec:
    """What computing a token costs, for all ranks together.

    token_flops: of a new token's matrices in all layers.  past_flops: of a token that is in the cache, for
    each call: MLA expands cached latents into heads.  head_flops: of the logits of a call's last token.
    weight_bytes: what a call reads at least, in the dtype that the config names.
    """

    token_flops: float
    past_flops: float
    head_flops: float
    attention: tuple[Attention, ...]
    weight_bytes: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ComputeSpec:
        """What a Hugging Face config.json says. Raises ModelSpecError."""
        spec = ModelSpec.from_config(config, kv_dtype=None if _names_dtype(config) else "bfloat16")
        return _compute_spec(text_reader(config), spec)

    @property
    def token_weights(self) -> float:
        """Weights that a token passes through, without embeddings and the LM head."""
        return self.token_flops / 2

    def flops(self, past: int, new: int) -> float:
        """F(past, new): of computing `new` tokens after `past` that are in the cache, in one call.

        Raises ValueError for negative counts.
        """
        if past < 0 or new < 0:
            raise ValueError(f"tokens must not be negative, got past {past} and new {new}")
        if not new:
            return 0.0
        seen = sum(a.pair_flops * a.pairs(past, new) for a in self.attention)
        return new * self.token_flops + past * self.past_flops + seen + self.head_flops


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _names_dtype(data: Mapping[str, Any]) -> bool:
    sections = [data, *(v for v in data.values() if isinstance(v, Mapping))]
    # An engine's choice of quantized KV does not change what is computed.
    quantized = any(isinstance(s.get("quantization_config"), Mapping) for s in sections)
    return not quantized and any(s.get("torch_dtype") or s.get("dtype") for s in sections)


def _compute_spec(text: ConfigReader, spec: ModelSpec) -> ComputeSpec:
    owning = {layer for group in spec.groups for layer in group.layers}
    # Layers that reuse an earlier layer's KV compute like the average of those that keep their own.
    repeat = spec.layers / len(owning) if text.zero_or_count("num_kv_shared_layers") else 1.0
    weights = _mlp_weights(text, spec)
    past = 0.0
    attention = []
    state_flops = 0.0
    for group in spec.groups:
        layers = len(group.layers) * repeat
        if group.kind == "state":
            weights += layers * _state_weights(text, spec)
            state_flops += layers * _STATE_FLOPS * max(p.heads * p.head_elements for p in group.state)
            continue
        weights += layers * _attention_weights(text, spec, group)
        key_dim, value_dim = _pair_dims(text, spec, group)
        pair = layers * spec.attention_heads * (2 * key_dim + 2 * value_dim)
        attention.append(Attention(pair, group.window_tokens))
        if group.is_latent:
            past += layers * 2 * _latent_expansion(text, spec)
    head = 2.0 * spec.hidden_size * (spec.vocab_size or 0)
    itemsize = 1 if text.has("quantization_config") else 2
    read = (weights + head / 2) * itemsize
    return ComputeSpec(2 * weights + state_flops, past, head, tuple(attention), read)


def _attention_weights(text: ConfigReader, spec: ModelSpec, group: LayerGroup) -> float:
    """Weights of one attention layer's projections."""
    hidden, heads = spec.hidden_size, spec.attention_heads
    if group.is_latent:
        rank, rope = group.key_dims
        query_rank = text.optional_count("q_lora_rank")
        query = heads * spec.head_dim
        query_weights = query_rank * (hidden + query) if query_rank else hidden * query
        out = heads * text.count("v_head_dim") * hidden
        return query_weights + hidden * (rank + rope) + _latent_expansion(text, spec) + out
    key, value = group.key_dims[0], group.value_dims[0]
    return hidden * (heads * key + group.kv_heads * (key + value) + heads * value)


def _latent_expansion(text: ConfigReader, spec: ModelSpec) -> float:
    """Weights that make one latent into keys and values of all heads, as engines do in a prefill."""
    per_head = text.count("qk_nope_head_dim") + text.count("v_head_dim")
    return text.count("kv_lora_rank") * spec.attention_heads * per_head


def _pair_dims(text: ConfigReader, spec: ModelSpec, group: LayerGroup) -> tuple[int, int]:
    if group.is_latent:
        return spec.head_dim, text.count("v_head_dim")
    return group.key_dims[0], group.value_dims[0]


def _state_weights(text: ConfigReader, spec: ModelSpec) -> float:
    """Weights of one recurrent layer's projections in and out."""
    hidden = spec.hidden_size
    if text.has("linear_num_value_heads"):
        keys = text.count("linear_num_key_heads") * text.count("linear_key_head_dim")
        values = text.count("linear_num_value_heads") * text.count("linear_value_head_dim")
        # Queries and keys, values, output gate, two gates for each head; then back.
        return hidden * (2 * keys + 3 * values + 2 * text.count("linear_num_value_heads"))
    inner = hidden * (text.optional_count("mamba_expand") or 1)
    # In with a gate, and out; the families' small matrices are left to the achieved rate.
    return 3 * hidden * inner


def _mlp_weights(text: ConfigReader, spec: ModelSpec) -> float:
    """Weights of all layers' MLPs that one token passes through, routers included."""
    ungated = text.model_type in _UNGATED or text.get("hidden_act", "mlp_hidden_act") in _UNGATED_ACTIVATIONS
    matrices = 2 if ungated else 3
    sparse = _expert_layers(text, spec)
    dense_width = text.get(
        "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "intermediate_size_mlp"
    )
    if text.has("intermediate_size_mlp"):
        dense_width = text.count("intermediate_size_mlp")
    if not isinstance(dense_width, int):
        dense_width = spec.intermediate_size
    experts = text.optional_count("n_routed_experts", "num_local_experts", "num_experts") or 0
    dense = (_mlp_layers(text, spec) - sparse) * matrices * spec.hidden_size * dense_width
    return dense + sparse * spec.hidden_size * (matrices * spec.intermediate_size + experts)


def _mlp_layers(text: ConfigReader, spec: ModelSpec) -> int:
    """Layers with an MLP. In a pattern of single parts (Nemotron-H) it is a layer of its own."""
    pattern = text.get("hybrid_override_pattern")
    return sum(c in "-E" for c in pattern) if isinstance(pattern, str) else spec.layers


def _expert_layers(text: ConfigReader, spec: ModelSpec) -> int:
    """How many layers have a mixture of experts."""
    if not text.has("num_experts_per_tok", "top_k_experts"):
        return 0
    pattern = text.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return pattern.count("E")
    first = text.zero_or_count("first_k_dense_replace")
    every = (
        text.optional_count("decoder_sparse_step", "interleave_moe_layer_step", "expert_layer_period") or 1
    )
    if isinstance(text.get("moe_layer_freq"), int):
        every = text.count("moe_layer_freq")
    offset = text.zero_or_count("expert_layer_offset") if text.has("expert_layer_period") else every - 1
    dense = set(text.integers("mlp_only_layers")) if text.has("mlp_only_layers") else set()
    layers = [i for i in range(first, spec.layers) if i % every == offset % every and i not in dense]
    if not layers:
        raise ModelSpecError(f"{text.where}: no layer has experts", fix="check the keys of the expert layers")
    return len(layers)
