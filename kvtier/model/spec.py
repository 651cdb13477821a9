"""The KV geometry of a model, from its Hugging Face config.json: what each layer keeps, and how many bytes.

MLA models are described as serving engines keep them: one latent and one rope key for each token and layer,
shared by all heads.  (The cache of Hugging Face transformers holds the expanded heads instead.)  Padding,
per-token scales and other additions of an engine's own layout are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvtier.errors import GeometryError
from kvtier.geometry import Geometry
from kvtier.model.config_json import ConfigReader, compute_dtype, load_config, row_dtype, text_reader
from kvtier.model.groups import DTYPE_BYTES, LayerGroup
from kvtier.model.layers import kv_head_count, layer_count, layer_groups
from kvtier.objects import Shard


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a model keeps for each token, and the sizes that the cost of recomputing it depends on.

    layers: L.  groups: index i is the `group` of an ObjectId.  dtype: of KV rows.  hidden_size: d.
    attention_heads: h.  head_dim: d_h, of a query.  kv_heads: h_kv, as computed (MLA: all heads).
    intermediate_size: f, the MLP width that a token passes through; in a mixture of experts, the experts per
    token times their width, with the shared ones.  name: for people, not compared.
    """

    model_type: str
    layers: int
    groups: tuple[LayerGroup, ...]
    dtype: str
    hidden_size: int
    attention_heads: int
    head_dim: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int | None
    name: str = field(default="model", compare=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path, *, kv_dtype: str | None = None) -> ModelSpec:
        """Read a config, the path of a config.json, or of its folder.

        kv_dtype: of KV rows where the engine's differs from the model's, such as 'fp8_e4m3'.  Raises
        ModelSpecError, naming the key that is missing or contradicts another one, and the fix.
        """
        data, name = load_config(config)
        text = text_reader(data)
        dtype = row_dtype(data, text, kv_dtype)
        return cls(
            model_type=text.model_type,
            layers=layer_count(text),
            groups=layer_groups(text, dtype, compute_dtype(data, text) or dtype),
            dtype=dtype,
            hidden_size=text.count("hidden_size", "n_embd", "d_model"),
            attention_heads=text.count("num_attention_heads", "n_head", "n_heads"),
            head_dim=_query_dim(text),
            kv_heads=kv_head_count(text),
            intermediate_size=_mlp_width(text),
            vocab_size=text.optional_count("vocab_size"),
            name=name,
        )

    @property
    def itemsize(self) -> int:
        """Bytes of one element of a KV row."""
        return DTYPE_BYTES[self.dtype]

    @property
    def head_units(self) -> int:
        """What `Shard.first_head` and `Shard.heads` count: KV heads, in all models without state layers.

        It is the largest head count of any part that is kept.  1 for MLA: ranks of one tensor-parallel
        group have equal shards.
        """
        return max(g.head_units for g in self.groups)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all groups that keep tokens, before any window ends."""
        return sum(g.token_bytes for g in self.groups)

    @property
    def state_bytes(self) -> int:
        """Bytes of one snapshot of all state layers; 0 for most models."""
        return sum(g.state_bytes for g in self.groups)

    def block_bytes(self, block_tokens: int) -> int:
        """Bytes of a full block over all groups that keep tokens."""
        return block_tokens * self.bytes_per_token

    def conversation_bytes(self, tokens: int) -> int:
        """Bytes that are needed to go on after `tokens` tokens, with one snapshot of the state layers.

        A sliding layer stops growing at W-1 tokens.  What is stored may be up to a block more for each
        sliding layer, since blocks are whole.
        """
        return sum(g.conversation_bytes(tokens) for g in self.groups)

    def whole_shard(self) -> Shard:
        """All layers and heads: what a single rank holds."""
        return Shard(0, self.layers, 0, self.head_units)

    def shard_for(self, tp_rank: int, tp_size: int, pp_rank: int = 0, pp_size: int = 1) -> Shard:
        """The slice of one rank. Equal on ranks that hold the same KV: all of MLA, replicated KV heads.

        With more ranks than head units, each run of tp_size / head_units ranks holds one head, as vLLM and
        SGLang place them.  Raises GeometryError when sizes do not divide.  Engines differ in which
        pipeline rank gets the layers left over, so an uneven split has to be given as a Shard.
        """
        _check_rank("tp", tp_rank, tp_size)
        _check_rank("pp", pp_rank, pp_size)
        units = self.head_units
        if units % tp_size and tp_size % units:
            raise GeometryError(
                f"{units} KV heads do not split over tp_size {tp_size}",
                fix="use a tensor-parallel size that divides the heads, or a multiple of them",
            )
        if self.layers % pp_size:
            raise GeometryError(
                f"{self.layers} layers do not split evenly over pp_size {pp_size}",
                fix="give Shard(first_layer, layers, first_head, heads) as the engine splits them",
            )
        depth, width = self.layers // pp_size, max(1, units // tp_size)
        return Shard(pp_rank * depth, depth, tp_rank * units // tp_size, width)

    def geometry(self, shard: Shard | None, block_tokens: int, page_tokens: int) -> Geometry:
        """What the daemon needs to know of one rank's KV; None means the whole model.

        Every group keeps its index; one without layers in the shard has zero bytes.  Raises GeometryError.
        """
        shard = shard or self.whole_shard()
        if page_tokens < 1 or block_tokens < 1 or block_tokens % page_tokens:
            raise GeometryError(
                f"block_tokens {block_tokens} is not a multiple of page_tokens {page_tokens}",
                fix="choose a block of whole engine pages, such as 256 tokens",
            )
        layers_fit = shard.first_layer >= 0 and shard.first_layer + shard.layers <= self.layers
        heads_fit = shard.first_head >= 0 and shard.first_head + shard.heads <= self.head_units
        if not (layers_fit and heads_fit and shard.layers > 0 and shard.heads > 0):
            raise GeometryError(
                f"shard {shard.name} is not inside {self.whole_shard().name}",
                fix="count layers and heads from 0",
            )
        groups = tuple(g.geometry(shard, self.head_units) for g in self.groups)
        return Geometry(block_tokens, page_tokens, groups, self.itemsize)


@dataclass(frozen=True, slots=True)
class GroupSize:
    """One layer group of a SizeReport. Bytes of a state group's snapshot are in `conversation_bytes`."""

    kind: str
    layers: int
    window_tokens: int
    bytes_per_token: int
    kept_tokens: int
    block_bytes: int
    state_bytes: int
    conversation_bytes: int


@dataclass(frozen=True, slots=True)
class SizeReport:
    """How large a model's KV is: for one token, one block, and a conversation of `tokens` tokens."""

    name: str
    model_type: str
    dtype: str
    tokens: int
    block_tokens: int
    groups: tuple[GroupSize, ...]
    bytes_per_token: int
    block_bytes: int
    state_bytes: int
    conversation_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, for JSON."""
        return asdict(self) | {"groups": [asdict(g) for g in self.groups]}


def size_report(spec: ModelSpec, tokens: int, block_tokens: int) -> SizeReport:
    """The sizes of a conversation of `tokens` tokens, for all ranks together.

    Raises GeometryError for negative tokens or an empty block.
    """
    if tokens < 0 or block_tokens < 1:
        raise GeometryError(
            f"tokens {tokens} and block_tokens {block_tokens} give no size",
            fix="tokens must not be negative, block_tokens at least 1",
        )
    groups = tuple(
        GroupSize(
            kind=g.kind,
            layers=len(g.layers),
            window_tokens=g.window_tokens,
            bytes_per_token=g.token_bytes,
            kept_tokens=g.kept_tokens(tokens),
            block_bytes=block_tokens * g.token_bytes,
            state_bytes=g.state_bytes,
            conversation_bytes=g.conversation_bytes(tokens),
        )
        for g in spec.groups
    )
    return SizeReport(
        name=spec.name,
        model_type=spec.model_type,
        dtype=spec.dtype,
        tokens=tokens,
        block_tokens=block_tokens,
        groups=groups,
        bytes_per_token=spec.bytes_per_token,
        block_bytes=spec.block_bytes(block_tokens),
        state_bytes=spec.state_bytes,
        conversation_bytes=spec.conversation_bytes(tokens),
    )


def _check_rank(kind: str, rank: int, size: int) -> None:
    if size < 1 or not 0 <= rank < size:
        raise GeometryError(
            f"{kind}_rank {rank} is not a rank of {kind}_size {size}", fix="ranks count from 0 to size - 1"
        )


def _query_dim(text: ConfigReader) -> int:
    """Elements of a query head; an MLA query has a part without and a part with rotary positions."""
    if text.has("kv_lora_rank"):
        return text.count("qk_nope_head_dim") + text.count("qk_rope_head_dim")
    return text.head_dim()


def _mlp_width(text: ConfigReader) -> int:
    """The MLP width that one token passes through; 4d where the config leaves it to the model's default."""
    dense = text.get("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
    if isinstance(dense, list):
        dense = sum(dense) // len(dense)
    experts = text.optional_count("num_experts_per_tok", "top_k_experts")
    if experts is None:
        return int(dense or 4 * text.count("hidden_size", "n_embd", "d_model"))
    width = text.optional_count("moe_intermediate_size") or text.count("intermediate_size")
    shared = text.optional_count("shared_expert_intermediate_size", "shared_intermediate_size")
    if shared is None:
        count = text.get("n_shared_experts")
        shared = width * count if isinstance(count, int) else 0
    return experts * width + shared
