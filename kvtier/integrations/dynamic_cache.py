"""What a transformers `DynamicCache` holds, as kvtier's contiguous layout, and the way back.

Read off transformers 5.23: every layer keeps `keys` and `values` of [1, kv_heads, tokens, head_dim].  A
`DynamicLayer` keeps all tokens.  A `DynamicSlidingWindowLayer` with window W keeps the last W-1 of them, and
counts all of them in `cumulative_length`, from which positions and masks come.  `update` never writes into
these tensors: it concatenates into new ones, so tensors that are being parked may stay in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from kvtier.errors import GeometryError, TokensError
from kvtier.gpu.describe import contiguous
from kvtier.gpu.layout import LayerGroup, PoolLayout
from kvtier.gpu.pool import Binding, bind_sequence
from kvtier.model.spec import ModelSpec
from kvtier.objects import Shard

# One layer's keys and values, each [1, kv_heads, tokens, head_dim].
LayerTensors: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_DYNAMIC_ONLY = "kvtier parks a plain DynamicCache: pass past_key_values=DynamicCache(config=model.config)"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer of the cache keeps. index: its place in `cache.layers`.  window_tokens: 0 for full."""

    index: int
    group: int
    window_tokens: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Staged:
    """Fresh memory for the KV of [0, tokens), and where kvtier finds it.

    layers: in the order of CacheShape.layers; a sliding layer has rows from its group's base on.
    """

    tokens: int
    layers: tuple[LayerTensors, ...]
    bases: tuple[int, ...]
    binding: Binding


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The cache of one model: layers that keep KV, their groups, and the layout of it all."""

    config: Any
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    layers: tuple[LayerShape, ...]
    layout: PoolLayout

    def export(self, cache: Any, token_count: int) -> tuple[int, Binding]:
        """(tokens in the cache, binding to its memory); nothing is copied.

        token_count: of the sequence that the cache belongs to, which may be longer than the cache: after
        `generate` it is longer by one.  Raises GeometryError, TokensError.
        """
        check_cache(cache)
        found = [self._layer_tensors(cache, shape) for shape in self.layers]
        lengths = {_length(cache.layers[shape.index]) for shape in self.layers}
        if len(lengths) > 1:
            raise GeometryError(f"the layers hold different numbers of tokens: {sorted(lengths)}")
        tokens = lengths.pop()
        if token_count < tokens:
            raise TokensError(
                f"{token_count} token ids were given for a cache of {tokens} tokens",
                fix="give all ids that were fed to the model, from the first on",
            )
        bases = [0] * len(self.layout.groups)
        for shape, (keys, _) in zip(self.layers, found, strict=True):
            bases[shape.group] = tokens - int(keys.shape[2])
            _check_rows(shape, tokens, int(keys.shape[2]))
        return tokens, bind_sequence(self.layout, found, bases=bases)

    def _layer_tensors(self, cache: Any, shape: LayerShape) -> LayerTensors:
        """The layer's keys and values, checked against the shape."""
        if shape.index >= len(cache.layers):
            raise GeometryError(f"the cache has {len(cache.layers)} layers, layer {shape.index} is missing")
        layer = cache.layers[shape.index]
        wanted = DynamicSlidingWindowLayer if shape.window_tokens else DynamicLayer
        if type(layer) is not wanted:
            raise GeometryError(
                f"layer {shape.index} is a {type(layer).__name__}, for this model it should be a "
                f"{wanted.__name__}",
                fix=_DYNAMIC_ONLY,
            )
        if shape.window_tokens and layer.sliding_window != shape.window_tokens:
            raise GeometryError(
                f"layer {shape.index} has window {layer.sliding_window}, not {shape.window_tokens}"
            )
        if not layer.is_initialized or layer.keys.numel() == 0:
            raise GeometryError(f"layer {shape.index} is empty", fix="run the model before parking its cache")
        for tensor, dim in ((layer.keys, shape.key_dim), (layer.values, shape.value_dim)):
            self._check_tensor(tensor, shape, dim)
        return layer.keys, layer.values

    def _check_tensor(self, tensor: torch.Tensor, shape: LayerShape, dim: int) -> None:
        if tensor.ndim != 4 or tensor.shape[0] != 1:
            raise GeometryError(
                f"layer {shape.index} holds a tensor of shape {tuple(tensor.shape)}: batch size 1 only",
                fix="park each conversation of a batch by itself",
            )
        if (tensor.shape[1], tensor.shape[3]) != (shape.kv_heads, dim):
            raise GeometryError(
                f"layer {shape.index} holds {tensor.shape[1]} heads of {tensor.shape[3]}, the config says "
                f"{shape.kv_heads} of {dim} for this rank"
            )
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise GeometryError(
                f"layer {shape.index} is {tensor.dtype} on {tensor.device}, attached was {self.dtype} on "
                f"{self.device}",
                fix="attach again after moving or casting the model",
            )

    def stage(self, tokens: int) -> Staged:
        """Memory to load the KV of [0, tokens) into; tokens at least 1.

        A sliding layer gets rows from the beginning of the block that its window begins in, since objects
        are loaded whole.
        """
        block = self.layout.block_tokens
        bases = tuple(group.needed_from(tokens) // block * block for group in self.layout.geometry.groups)
        layers = tuple(
            (
                self._empty(s, tokens - bases[s.group], s.key_dim),
                self._empty(s, tokens - bases[s.group], s.value_dim),
            )
            for s in self.layers
        )
        return Staged(tokens, layers, bases, bind_sequence(self.layout, layers, bases=bases))

    def _empty(self, shape: LayerShape, rows: int, dim: int) -> torch.Tensor:
        return torch.empty(1, shape.kv_heads, rows, dim, dtype=self.dtype, device=self.device)

    def restorable(self, staged: Staged, tokens: int) -> bool:
        """Whether a front of `tokens` can be cut out of what was staged: its windows must lie in it."""
        groups = self.layout.geometry.groups
        return 0 < tokens <= staged.tokens and all(
            group.needed_from(tokens) >= base for group, base in zip(groups, staged.bases, strict=True)
        )

    def assemble(self, staged: Staged, tokens: int) -> DynamicCache:
        """A cache that holds exactly the first `tokens` tokens, like one that computed them."""
        cache = DynamicCache(config=self.config)
        for shape, (keys, values) in zip(self.layers, staged.layers, strict=True):
            first, end = 0, tokens - staged.bases[shape.group]
            if shape.window_tokens:
                first = max(0, end - shape.window_tokens + 1)
            layer = cache.layers[shape.index]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys[:, :, first:end], values[:, :, first:end]
            if shape.window_tokens:
                layer.cumulative_length = tokens
        return cache


def cache_shape(model: Any, block_tokens: int, shard: Shard | None = None) -> CacheShape:
    """The cache of a transformers model. shard: the heads of it that this rank's cache holds; None: all.

    Raises GeometryError for models whose cache is not plain KV, and for slices of layers.
    """
    config = model.config.get_text_config(decoder=True)
    spec = ModelSpec.from_config(config.to_dict(), kv_dtype=str(model.dtype).removeprefix("torch."))
    layers = _layer_shapes(spec, shard or spec.whole_shard())
    _check_layer_classes(DynamicCache(config=model.config).layers, layers)
    samples = [
        [
            torch.empty(1, s.kv_heads, 1, dim, dtype=model.dtype, device="cpu")
            for dim in (s.key_dim, s.value_dim)
        ]
        for s in layers
    ]
    groups = [
        LayerGroup(
            "sliding" if group.window_tokens else "full",
            tuple(place for place, shape in enumerate(layers) if shape.group == g),
            group.window_tokens,
        )
        for g, group in enumerate(spec.groups)
    ]
    layout = contiguous(samples, block_tokens=block_tokens, groups=groups)
    return CacheShape(model.config, spec, model.dtype, model.device, layers, layout)


def _layer_shapes(spec: ModelSpec, shard: Shard) -> tuple[LayerShape, ...]:
    """In the order of the model's layers; layers that keep no KV of their own are left out."""
    if (shard.first_layer, shard.layers) != (0, spec.layers):
        raise GeometryError(
            f"{shard.name} has not all {spec.layers} layers",
            fix="split the heads of a transformers model over its ranks, and not its layers",
        )
    shapes = []
    for g, group in enumerate(spec.groups):
        if group.kind == "state" or group.is_latent:
            kept = "a recurrent state" if group.kind == "state" else "latents"
            raise GeometryError(
                f"{spec.model_type} keeps {kept} in layers {group.layers}",
                fix="kvtier parks transformers caches of full and sliding attention layers",
            )
        if group.kind == "sliding" and group.window_tokens < 2:
            raise GeometryError(f"layers {group.layers} have a window of {group.window_tokens} tokens")
        heads = group.kv_heads * shard.heads // spec.head_units
        key_dim, value_dim = sum(group.key_dims), sum(group.value_dims)
        shapes += [
            LayerShape(index, g, group.window_tokens, heads, key_dim, value_dim) for index in group.layers
        ]
    return tuple(sorted(shapes, key=lambda shape: shape.index))


def _check_layer_classes(cache_layers: Sequence[Any], shapes: Sequence[LayerShape]) -> None:
    """transformers and ModelSpec must read the same layer pattern out of the config."""
    by_index = {shape.index: shape for shape in shapes}
    for index, layer in enumerate(cache_layers):
        shape = by_index.get(index)
        wanted: type = DummyLayer
        if shape is not None:
            wanted = DynamicSlidingWindowLayer if shape.window_tokens else DynamicLayer
        if type(layer) is not wanted:
            raise GeometryError(
                f"transformers keeps layer {index} in a {type(layer).__name__}, by its config it should be "
                f"in a {wanted.__name__}",
                fix="kvtier parks DynamicLayer and DynamicSlidingWindowLayer",
            )


def check_cache(cache: Any) -> None:
    """Raise GeometryError unless this is a plain, filled DynamicCache."""
    if type(cache) is not DynamicCache:
        raise GeometryError(f"{type(cache).__name__} cannot be parked", fix=_DYNAMIC_ONLY)
    if cache.offloading:
        raise GeometryError("an offloaded cache cannot be parked", fix="make it without offloading=True")


def _length(layer: Any) -> int:
    return int(layer.get_seq_length())


def _check_rows(shape: LayerShape, tokens: int, rows: int) -> None:
    wanted = min(tokens, shape.window_tokens - 1) if shape.window_tokens else tokens
    if not wanted <= rows <= tokens:
        raise GeometryError(f"layer {shape.index} has {rows} rows after {tokens} tokens, {wanted} are needed")
