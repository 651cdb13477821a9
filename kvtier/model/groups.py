"""Layer groups: which layers keep the same tokens, and how many bytes each of them keeps.

A group is stored in parts. A part belongs to heads (KV heads, linear-attention heads, or the one latent that
all heads of an MLA model share), and a rank holds the heads of its slice. Slices are counted in head units:
the largest head count of the model. A part with fewer heads than units is replicated where a slice is finer
than its heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.errors import GeometryError, ModelSpecError
from kvtier.geometry import SCALE_BYTES, GroupGeometry, GroupKind
from kvtier.objects import Shard

DTYPE_BYTES: dict[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "int8": 1,
}
LOSSY_DTYPES = frozenset({"float32", "bfloat16", "float16"})
_DTYPE_ALIASES: dict[str, str] = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp8": "fp8_e4m3",
    "float8_e4m3": "fp8_e4m3",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
}


def dtype_name(name: object) -> str:
    """The one name of a dtype: 'bf16', 'torch.bfloat16' and 'bfloat16' are all 'bfloat16'.

    Raises ModelSpecError for a dtype that KV cannot have.
    """
    text = str(name).removeprefix("torch.").lower()
    text = _DTYPE_ALIASES.get(text, text)
    if text not in DTYPE_BYTES:
        raise ModelSpecError(f"unknown dtype {name!r}", fix=f"give one of {', '.join(DTYPE_BYTES)}")
    return text


def heads_in_slice(heads: int, units: int, shard: Shard) -> int:
    """How many of a part's `heads` a shard holds, where the model's heads are counted in `units`.

    Raises GeometryError when the slice cuts through heads: it must hold whole heads, or lie inside one,
    which is then replicated.
    """
    first, end = shard.first_head * heads, (shard.first_head + shard.heads) * heads
    if first % units == 0 and end % units == 0:
        return (end - first) // units
    if first // units == (end - 1) // units:
        return 1
    raise GeometryError(
        f"shard {shard.name} cuts through the {heads} heads of a part of {units} head units",
        fix="choose a tensor-parallel size that divides the head counts of every layer group",
    )


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of a state layer's snapshot: `heads` times `head_elements` elements of `dtype`."""

    name: str
    heads: int
    head_elements: int
    dtype: str


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep the same tokens in rows of the same shape.

    layers: absolute layer indices, ascending.  kv_heads: heads that rows are split by; 1 for MLA.
    key_dims, value_dims: elements of one head's rows: ((128,), (128,)) for plain attention, and
    ((latent, rope), ()) for MLA, whose one latent row serves as key and value.  window_tokens: 0 unless
    sliding.  state: the parts of one layer's snapshot, only for kind 'state', which keeps no rows.
    """

    kind: GroupKind
    layers: tuple[int, ...]
    dtype: str
    kv_heads: int = 0
    key_dims: tuple[int, ...] = ()
    value_dims: tuple[int, ...] = ()
    window_tokens: int = 0
    state: tuple[StatePart, ...] = ()

    @property
    def is_latent(self) -> bool:
        """Whether rows are MLA latents: one for all heads, not split by tensor parallelism."""
        return bool(self.key_dims) and not self.value_dims

    @property
    def itemsize(self) -> int:
        """Bytes of one element of a row."""
        return DTYPE_BYTES[self.dtype]

    @property
    def head_units(self) -> int:
        """The largest head count among the group's parts."""
        return max([self.kv_heads, *(part.heads for part in self.state)])

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token in one layer, all heads; 0 for 'state'."""
        return self.kv_heads * (sum(self.key_dims) + sum(self.value_dims)) * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers of the group; 0 for 'state'."""
        return len(self.layers) * self.layer_token_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of one snapshot over all layers of the group; 0 unless 'state'."""
        per_layer = sum(p.heads * p.head_elements * DTYPE_BYTES[p.dtype] for p in self.state)
        return len(self.layers) * per_layer

    def kept_tokens(self, tokens: int) -> int:
        """Tokens whose rows are needed to go on after `tokens` tokens: at most W-1 in a sliding group.

        The next token attends to itself and the W-1 before it; see `GroupGeometry.needed_from`.
        """
        return tokens - GroupGeometry(self.kind, 0, self.window_tokens).needed_from(tokens)

    def conversation_bytes(self, tokens: int) -> int:
        """Bytes that are needed to go on after `tokens` tokens, the snapshot of a state group included."""
        return self.kept_tokens(tokens) * self.token_bytes + self.state_bytes

    def geometry(self, shard: Shard, units: int) -> GroupGeometry:
        """The group's part in one shard; zero bytes when the shard has none of its layers."""
        end = shard.first_layer + shard.layers
        layers = sum(shard.first_layer <= i < end for i in self.layers)
        row = (sum(self.key_dims) + sum(self.value_dims)) * self.itemsize
        heads = heads_in_slice(self.kv_heads, units, shard) if row else 0
        snapshot = sum(
            heads_in_slice(p.heads, units, shard) * p.head_elements * DTYPE_BYTES[p.dtype] for p in self.state
        )
        nbytes = layers * heads * row
        return GroupGeometry(
            self.kind, nbytes, self.window_tokens, layers * snapshot, layers * heads * self._lossy_row
        )

    @property
    def _lossy_row(self) -> int:
        """Bytes of one head's row in one layer under a lossy codec; 0 where the codecs do not take it."""
        dims = [*self.key_dims, *self.value_dims]
        # A latent is kept as one vector, its rope part included; see the layouts of such pools.
        vectors = [sum(dims)] if self.is_latent else dims
        if self.dtype not in LOSSY_DTYPES or len(set(vectors)) != 1:
            return 0
        return sum(vector + SCALE_BYTES for vector in vectors)
