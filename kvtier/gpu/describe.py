"""Layouts from tensors, or from shapes and strides: `paged`, `cross_layer`, `contiguous`.

Dimensions are named by a string, in the order of the tensor's shape:
    page    index of the page                     token  position in the page (or in the sequence)
    layer   only where layers share one tensor    kv     K and V in one tensor, size 2
    head    KV heads                              dim    elements of one head, or of MLA's latent
    batch   only in contiguous caches, size 1
For pages, memory order is taken from the strides and may differ from the order of the names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtier.errors import GeometryError
from kvtier.gpu.layout import BufferSpec, LayerGroup, Plane, PoolLayout, assemble, check_groups
from kvtier.gpu.quantise import Values, dtype_of
from kvtier.gpu.tensors import TensorLike, TensorSpec, spec_of, stacked

LETTERS = {"layer": "l", "kv": "c", "head": "h", "dim": "d"}
ENUMERATED = ("layer", "kv", "head", "dim")
PAGED_DIMS = {*LETTERS, "page", "token"}
SEQUENCE_DIMS = {"batch", "head", "token", "dim"}


@dataclass(frozen=True, slots=True)
class _Axis:
    name: str
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class _Place:
    buffer: int
    offset: int
    layer: int
    group: int


def paged(
    layers: Sequence[Sequence[TensorLike]],
    dims: str,
    *,
    block_tokens: int,
    groups: Sequence[LayerGroup] = (),
) -> PoolLayout:
    """Layers with tensors of their own.

    layers: for each layer its tensors: (K, V), or one tensor with a `kv` dimension, or one latent tensor;
    arrays, torch tensors or TensorSpec.  dims: of each of them, e.g. 'page token head dim'.  Layers of
    different groups may name the same tensor when they use different pages of it.
    Buffers are the tensors in the order given.  Raises GeometryError.
    """
    specs = [[spec_of(tensor) for tensor in tensors] for tensors in layers]
    flat = [spec for tensors in specs for spec in tensors]
    itemsize = _one_itemsize(flat)
    chosen = check_groups(groups, len(layers))
    first_buffer = [0, *itertools.accumulate(len(tensors) for tensors in specs)]
    planes: list[list[Plane]] = [[] for _ in chosen]
    for g, group in enumerate(chosen):
        for layer in group.layers:
            apart = ("layer", "kv") if len(specs[layer]) > 1 else ("layer",)
            for i, spec in enumerate(specs[layer]):
                place = _Place(first_buffer[layer] + i, 0, layer, g)
                planes[g] += _cut(_axes(spec, dims, PAGED_DIMS - {"layer"}), itemsize, place, apart)
    return assemble("paged", block_tokens, chosen, planes, _buffers(flat), itemsize, _values(flat, dims))


def cross_layer(
    storage: TensorLike | Sequence[TensorLike],
    dims: str,
    *,
    block_tokens: int,
    groups: Sequence[LayerGroup] = (),
) -> PoolLayout:
    """All layers in one storage, e.g. 'page layer kv token head dim'.

    storage: the tensor, or a list of the layers' equal views into it, in order; then dims are those of a
    view, and the layout's one buffer begins at the first view.  Raises GeometryError.
    """
    if isinstance(storage, list | tuple):
        spec, dims = stacked(storage), f"layer {dims}"
    else:
        spec = spec_of(storage)
    axes = _axes(spec, dims, PAGED_DIMS)
    across = next((axis for axis in axes if axis.name == "layer"), None)
    if across is None:
        raise GeometryError(
            f"the dimensions '{dims}' have no layer", fix="use paged() for one layer a tensor"
        )
    chosen = check_groups(groups, across.size)
    planes: list[list[Plane]] = [[] for _ in chosen]
    for g, group in enumerate(chosen):
        for first, count in _runs(group.layers):
            part = [replace(axis, size=count) if axis is across else axis for axis in axes]
            planes[g] += _cut(part, spec.itemsize, _Place(0, first * across.stride, first, g), ())
        planes[g].sort(key=lambda plane: plane.layer)
    values = _values([spec], dims)
    return assemble("paged", block_tokens, chosen, planes, _buffers([spec]), spec.itemsize, values)


def contiguous(
    layers: Sequence[Sequence[TensorLike]],
    dims: str = "batch head token dim",
    *,
    block_tokens: int,
    groups: Sequence[LayerGroup] = (),
) -> PoolLayout:
    """A cache with whole sequences in one tensor for each layer and K and V, as in transformers.

    layers: sample tensors of any length, for sizes only; the memory comes with each conversation.  Raises
    GeometryError.
    """
    specs = [[spec_of(tensor) for tensor in tensors] for tensors in layers]
    flat = [spec for tensors in specs for spec in tensors]
    itemsize = _one_itemsize(flat)
    chosen = check_groups(groups, len(layers))
    planes: list[list[Plane]] = [[] for _ in chosen]
    for g, group in enumerate(chosen):
        for layer in group.layers:
            apart = ["layer", "kv"] if len(specs[layer]) > 1 else ["layer"]
            for spec in specs[layer]:
                sample = sequence_plane(spec, dims, layer=layer, group=g)
                inner = [a for a in _axes(spec, dims, SEQUENCE_DIMS) if a.size > 1 and a.name in LETTERS]
                outside = [a for a in inner if a.name == "head"]
                form = _form(apart, block_tokens, outside, [a for a in inner if a.name == "dim"])
                planes[g].append(replace(sample, pages=0, page_tokens=block_tokens, form=form))
    return assemble("contiguous", block_tokens, chosen, planes, (), itemsize, _values(flat, dims))


def sequence_plane(spec: TensorSpec, dims: str, *, buffer: int = 0, layer: int, group: int) -> Plane:
    """One tensor of a contiguous cache as a plane with one page, as long as its sequence.

    Heads may lie inside or outside of tokens in memory: the stored order is the same.  Raises GeometryError.
    """
    axes = {axis.name: axis for axis in _axes(spec, dims, SEQUENCE_DIMS)}
    if "batch" in axes and axes["batch"].size != 1:
        raise GeometryError("a tensor holds several conversations", fix="park each batch entry by itself")
    if "dim" not in axes or (axes["dim"].size > 1 and axes["dim"].stride != spec.itemsize):
        raise GeometryError(f"the innermost dimension of {spec.dtype} {spec.shape} is not contiguous")
    token, head = axes["token"], axes.get("head", _Axis("head", 1, 0))
    row = axes["dim"].size * spec.itemsize
    return Plane(buffer, 0, 1, 0, token.size, head.size, head.stride, token.stride, row, layer, group, "")


def _axes(spec: TensorSpec, dims: str, known: set[str]) -> list[_Axis]:
    names = dims.split()
    wrong = [name for name in names if name not in known]
    if wrong or len(set(names)) < len(names) or "token" not in names or ("page" in known) > ("page" in names):
        raise GeometryError(f"'{dims}' does not name the dimensions of this kind of cache", fix=f"{known}")
    if len(names) != len(spec.shape):
        raise GeometryError(f"'{dims}' does not fit a tensor of shape {spec.shape}")
    return [_Axis(*axis) for axis in zip(names, spec.shape, spec.strides, strict=True)]


def _cut(axes: Sequence[_Axis], itemsize: int, place: _Place, apart: Sequence[str]) -> list[Plane]:
    """The planes of one tensor; apart: dimensions that the tensors before it stand for."""
    kept = [axis for axis in axes if axis.size > 1 or axis.name in ("page", "token", "layer")]
    order = sorted(kept, key=lambda axis: -axis.stride)
    names = [axis.name for axis in order]
    at_page, at_token = names.index("page"), names.index("token")
    if at_page > at_token:
        raise GeometryError("a token lies outside of its page in memory")
    row = _row_bytes(order[at_token + 1 :], itemsize)
    _check_apart(order, row, at_token)
    middle = order[at_page + 1 : at_token]
    split = _uniform_from(middle)
    each = sorted([*order[:at_page], *middle[:split]], key=lambda axis: ENUMERATED.index(axis.name))
    strips = middle[split:]
    form = _form([*apart, *(axis.name for axis in each)], order[at_token].size, strips, order[at_token + 1 :])
    planes = []
    for index in itertools.product(*(range(axis.size) for axis in each)):
        offset = place.offset + sum(i * axis.stride for i, axis in zip(index, each, strict=True))
        layer = place.layer + (index[0] if each and each[0].name == "layer" else 0)
        planes.append(
            Plane(
                place.buffer,
                offset,
                order[at_page].size,
                order[at_page].stride,
                order[at_token].size,
                math.prod(axis.size for axis in strips),
                strips[-1].stride if strips else 0,
                order[at_token].stride,
                row,
                layer,
                place.group,
                form,
            )
        )
    return planes


def _row_bytes(inner: Sequence[_Axis], itemsize: int) -> int:
    """Bytes of one token's row, which has to lie without gaps."""
    size = itemsize
    for axis in reversed(inner):
        if axis.size > 1 and axis.stride != size:
            raise GeometryError(
                f"dimension '{axis.name}' inside the token has gaps in memory",
                fix="describe the whole tensor, not a slice of it",
            )
        size *= axis.size
    return size


def _check_apart(order: Sequence[_Axis], row: int, at_token: int) -> None:
    extent = row
    for axis in reversed(order[: at_token + 1]):
        if axis.size > 1 and axis.stride < extent:
            raise GeometryError(f"dimension '{axis.name}' overlaps itself in memory")
        extent += (axis.size - 1) * axis.stride


def _uniform_from(middle: Sequence[_Axis]) -> int:
    """From which dimension on strips are at one distance; those before it make planes."""
    first = max(0, len(middle) - 1)
    while first and middle[first - 1].stride == middle[first].stride * middle[first].size:
        first -= 1
    return first


def _form(apart: Sequence[str], page_tokens: int, strips: Sequence[_Axis], row: Sequence[_Axis]) -> str:
    def text(axes: Sequence[_Axis]) -> str:
        return ",".join(LETTERS[a.name] + ("" if a.name == "layer" else str(a.size)) for a in axes)

    planes = ",".join(LETTERS[name] for name in apart)
    # With one strip the rows of a page follow those of the page before: its size makes no difference.
    page = f"p{page_tokens},{text(strips)}" if strips else ""
    return f"{planes}/{page}/{text(row)}"


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and layer == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((layer, 1))
    return runs


def _one_itemsize(specs: Sequence[TensorSpec]) -> int:
    kinds = {spec.dtype for spec in specs}
    if len(kinds) != 1:
        raise GeometryError(f"the pool's tensors have several dtypes or none: {sorted(kinds)}")
    return specs[0].itemsize


def _values(specs: Sequence[TensorSpec], dims: str) -> Values | None:
    """What rows are made of, when `dim` is innermost and alike in all tensors."""
    dtype, at = dtype_of(specs[0].dtype), dims.split().index("dim") if "dim" in dims.split() else None
    if dtype is None or at is None:
        return None
    vectors = {spec.shape[at] for spec in specs if spec.strides[at] == spec.itemsize}
    inner = all(spec.strides[at] == spec.itemsize for spec in specs)
    return Values(dtype, vectors.pop()) if inner and len(vectors) == 1 else None


def _buffers(specs: Sequence[TensorSpec]) -> list[BufferSpec]:
    return [BufferSpec(spec.address, spec.span_bytes) for spec in specs]
