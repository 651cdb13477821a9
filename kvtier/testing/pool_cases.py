"""Pools of every layout, each with a slow way to read it, for the tests of layouts and engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.gpu.describe import cross_layer, paged
from kvtier.gpu.layout import LayerGroup, PoolLayout
from kvtier.gpu.pool import Pool

P, PAGES, BLOCK = 4, 40, 16
Cell = Any  # called with (page, strip, token), answers the bytes of a row


class Slots:
    """Plain memory as slots; every generation is 1."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.full(nbytes, 0xEE, np.uint8)

    def view(self, address: tuple[int, int], nbytes: int) -> np.ndarray:
        return self.bytes[address[1] : address[1] + nbytes]

    def generation(self, slot_id: int) -> int:
        return 1


@dataclass
class Case:
    """A pool and how to read it slowly: for each group its planes as (strips, cell(page, strip, token))."""

    layout: PoolLayout
    tensors: list[Any]
    planes: list[list[tuple[int, Cell]]]

    def pool(self) -> Pool:
        return Pool(self.layout, self.tensors)

    def fill(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for tensor in self.tensors:
            raw = tensor.reshape(-1).view(np.uint8)
            raw[:] = rng.integers(0, 256, raw.size, dtype=np.uint8)

    def expected(self, group: int, table: Sequence[int], start: int, tokens: int, first_valid: int) -> bytes:
        out = []
        for strips, cell in self.planes[group]:
            for page in range(start // P, -(-(start + tokens) // P)):
                for strip in range(strips):
                    for token in range(P):
                        if start + first_valid <= page * P + token < start + tokens:
                            out.append(cell(table[page], strip, token))
        return b"".join(out)


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.zeros(shape, dtype)


def separate_k_v(dtype: str, layers: int, heads: int, dim: int) -> Case:
    ts = [_zeros((PAGES, P, heads, dim), dtype) for _ in range(2 * layers)]
    layout = paged(list(zip(ts[::2], ts[1::2], strict=True)), "page token head dim", block_tokens=BLOCK)
    return Case(layout, ts, [[(1, lambda p, s, t, a=a: a[p, t].tobytes()) for a in ts]])


def kv_outside(dtype: str, layers: int, heads: int, dim: int) -> Case:
    ts = [_zeros((2, PAGES, P, heads, dim), dtype) for _ in range(layers)]
    layout = paged([(t,) for t in ts], "kv page token head dim", block_tokens=BLOCK)
    planes = [(1, lambda p, s, t, a=a, c=c: a[c, p, t].tobytes()) for a in ts for c in range(2)]
    return Case(layout, ts, [planes])


def kv_in_page(dtype: str, layers: int, heads: int, dim: int) -> Case:
    ts = [_zeros((PAGES, 2, P, heads, dim), dtype) for _ in range(layers)]
    layout = paged([(t,) for t in ts], "page kv token head dim", block_tokens=BLOCK)
    return Case(layout, ts, [[(2, lambda p, s, t, a=a: a[p, s, t].tobytes()) for a in ts]])


def heads_outside(dtype: str, layers: int, heads: int, dim: int) -> Case:
    ts = [_zeros((PAGES, heads, P, 2 * dim), dtype) for _ in range(layers)]
    layout = paged([(t,) for t in ts], "page head token dim", block_tokens=BLOCK)
    return Case(layout, ts, [[(heads, lambda p, s, t, a=a: a[p, s, t].tobytes()) for a in ts]])


def latent(dtype: str, layers: int, heads: int, dim: int) -> Case:
    ts = [_zeros((PAGES, P, 9 * dim), dtype) for _ in range(layers)]
    layout = paged([(t,) for t in ts], "page token dim", block_tokens=BLOCK)
    return Case(layout, ts, [[(1, lambda p, s, t, a=a: a[p, t].tobytes()) for a in ts]])


def across(dtype: str, layers: int, heads: int, dim: int) -> Case:
    a = _zeros((PAGES, layers, 2, P, heads, dim), dtype)
    layout = cross_layer(a, "page layer kv token head dim", block_tokens=BLOCK)
    return Case(layout, [a], [[(2 * layers, lambda p, s, t: a[p, s // 2, s % 2, t].tobytes())]])


def across_token_outside(dtype: str, layers: int, heads: int, dim: int) -> Case:
    a = _zeros((PAGES, P, layers, 2, heads, dim), dtype)
    layout = cross_layer(a, "page token layer kv head dim", block_tokens=BLOCK)
    return Case(layout, [a], [[(1, lambda p, s, t: a[p, t].tobytes())]])


def across_views(dtype: str, layers: int, heads: int, dim: int) -> Case:
    """One view a layer into one storage, page outermost, heads outside of tokens."""
    a = _zeros((PAGES, layers, heads, P, 2 * dim), dtype)
    views = [a[:, layer] for layer in range(layers)]
    layout = cross_layer(views, "page head token dim", block_tokens=BLOCK)
    return Case(layout, [a], [[(layers * heads, lambda p, s, t: a[p, s // heads, s % heads, t].tobytes())]])


def across_layer_outermost(dtype: str, layers: int, heads: int, dim: int) -> Case:
    a = _zeros((layers, PAGES, heads, P, 2 * dim), dtype)
    layout = cross_layer(list(a), "page head token dim", block_tokens=BLOCK)
    planes = [(heads, lambda p, s, t, n=n: a[n, p, s, t].tobytes()) for n in range(layers)]
    return Case(layout, [a], [planes])


def views_as_paged(dtype: str, layers: int, heads: int, dim: int) -> Case:
    """The layers of a page-outermost storage, taken one by one: tokens of a page have gaps between them."""
    a = _zeros((PAGES, P, layers, 2, heads, dim), dtype)
    views = [(a[:, :, layer],) for layer in range(layers)]
    layout = paged(views, "page token kv head dim", block_tokens=BLOCK)
    case = Case(layout, [v for (v,) in views], [])
    case.planes = [[(1, lambda p, s, t, n=n: a[p, t, n].tobytes()) for n in range(layers)]]
    case.fill = lambda seed: Case(layout, [a], []).fill(seed)  # type: ignore[method-assign]
    return case


def two_groups(dtype: str, layers: int, heads: int, dim: int) -> Case:
    """Every other layer slides; both kinds in one page."""
    a = _zeros((PAGES, layers, 2, P, heads, dim), dtype)
    full, sliding = tuple(range(0, layers, 2)), tuple(range(1, layers, 2))
    groups = (LayerGroup("full", full), LayerGroup("sliding", sliding, window_tokens=8))
    layout = cross_layer(a, "page layer kv token head dim", block_tokens=BLOCK, groups=groups)
    planes = [
        [(2, lambda p, s, t, n=n: a[p, n, s, t].tobytes()) for n in members] for members in (full, sliding)
    ]
    return Case(layout, [a], planes)


BUILDERS = [
    separate_k_v,
    kv_outside,
    kv_in_page,
    heads_outside,
    latent,
    across,
    across_token_outside,
    across_views,
    across_layer_outermost,
    views_as_paged,
    two_groups,
]
# (dtype, layers, heads, dim): GQA, MHA with long rows, MQA, one byte a value
GEOMETRIES = [("uint16", 4, 2, 8), ("float32", 2, 8, 16), ("float16", 2, 1, 8), ("uint8", 3, 2, 16)]


def sequence(layout_lengths: Sequence[int], seed: int, *, transposed: bool = False) -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(seed)
    made = []
    for length in layout_lengths:
        shape = (1, length, 3, 8) if transposed else (1, 3, length, 8)
        pair = [rng.integers(0, 65536, shape, dtype=np.uint16) for _ in range(2)]
        made.append(tuple(t.transpose(0, 2, 1, 3) if transposed else t for t in pair))
    return made
