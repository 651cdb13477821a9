"""What cannot be a pool, or cannot be bound to one, is refused with GeometryError."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtier.errors import GeometryError
from kvtier.gpu.describe import contiguous, cross_layer, paged
from kvtier.gpu.layout import LayerGroup
from kvtier.gpu.pool import Pool, bind_sequence
from kvtier.gpu.tensors import TensorSpec, flat_bytes, spec_of, stacked

DIMS = "page token head dim"


def kv(pages: int = 8, tokens: int = 4, heads: int = 2, dim: int = 8, dtype: str = "uint16") -> np.ndarray:
    return np.zeros((pages, tokens, heads, dim), dtype)


def two_groups(window: int = 8) -> tuple[LayerGroup, LayerGroup]:
    return LayerGroup("full", (0,)), LayerGroup("sliding", (1,), window)


BAD_POOLS: dict[str, Any] = {
    "gap in dim": lambda: paged([(kv(dim=16)[..., ::2],)], DIMS, block_tokens=16),
    "gap in heads": lambda: paged([(kv(heads=4)[:, :, ::2],)], DIMS, block_tokens=16),
    "half of k and v": lambda: paged([(np.zeros((8, 4, 2, 2, 8))[:, :, :, 0],)], DIMS, block_tokens=16),
    "several dtypes": lambda: paged([(kv(), kv(dtype="float16"))], DIMS, block_tokens=16),
    "several sizes": lambda: paged([(kv(), kv(dtype="uint8"))], DIMS, block_tokens=16),
    "page counts": lambda: paged([(kv(8), kv(9))], DIMS, block_tokens=16),
    "page tokens": lambda: paged([(kv(tokens=4), kv(tokens=8))], DIMS, block_tokens=16),
    "block not whole pages": lambda: paged([(kv(),)], DIMS, block_tokens=18),
    "block of none": lambda: paged([(kv(),)], DIMS, block_tokens=0),
    "unknown dimension": lambda: paged([(kv(),)], "page token head depth", block_tokens=16),
    "dimension twice": lambda: paged([(kv(),)], "page token dim dim", block_tokens=16),
    "no pages": lambda: paged([(kv(),)], "kv token head dim", block_tokens=16),
    "too few dimensions": lambda: paged([(kv(),)], "page token dim", block_tokens=16),
    "token outside page": lambda: paged([(kv(),)], "token page head dim", block_tokens=16),
    "repeated pages": lambda: paged([(np.broadcast_to(kv(1), (8, 4, 2, 8)),)], DIMS, block_tokens=16),
    "negative strides": lambda: paged([(kv()[::-1],)], DIMS, block_tokens=16),
    "empty": lambda: paged([(kv(0),)], DIMS, block_tokens=16),
    "no layers": lambda: paged([], DIMS, block_tokens=16),
    "not a tensor": lambda: paged([([1, 2],)], DIMS, block_tokens=16),
    "layer missing": lambda: paged([(kv(),)] * 3, DIMS, block_tokens=16, groups=two_groups()),
    "layer twice": lambda: paged([(kv(),)], DIMS, block_tokens=16, groups=(LayerGroup("full", (0, 0)),)),
    "no window": lambda: paged([(kv(),)] * 2, DIMS, block_tokens=16, groups=two_groups(0)),
    "no layer dimension": lambda: cross_layer(kv(), DIMS, block_tokens=16),
    "uneven views": lambda: cross_layer([kv(), kv(), kv(9)], DIMS, block_tokens=16),
    "batch of two": lambda: contiguous([(np.zeros((2, 2, 5, 8)),)], block_tokens=16),
    "sequence gaps": lambda: contiguous([(np.zeros((1, 2, 5, 16))[..., ::2],)], block_tokens=16),
    "strides of another length": lambda: TensorSpec((2, 3), (3,), 1, "uint8"),
}


@pytest.mark.parametrize("build", BAD_POOLS.values(), ids=BAD_POOLS.keys())
def test_bad_pools(build: Any) -> None:
    with pytest.raises(GeometryError):
        build()


def test_control_the_same_pools_without_the_fault() -> None:
    assert paged([(kv(), kv())], DIMS, block_tokens=16).geometry.token_bytes == 64
    assert (
        paged([(kv(),)] * 2, DIMS, block_tokens=16, groups=two_groups()).geometry.groups[1].kind == "sliding"
    )
    assert contiguous([(np.zeros((1, 2, 5, 8)),)], block_tokens=16).geometry.page_tokens == 1


def test_a_shape_alone_describes_a_pool() -> None:
    array = kv()
    spec = TensorSpec(array.shape, array.strides, 2, "uint16")
    assert (
        paged([(spec,)], DIMS, block_tokens=16).layout_id
        == paged([(array,)], DIMS, block_tokens=16).layout_id
    )
    with pytest.raises(GeometryError):
        flat_bytes(spec, 16)


BAD_PAGES: dict[str, Any] = {
    "past the end": {"pages": [1, 8]},
    "negative": {"pages": [1, -1]},
    "twice": {"pages": [3, 4, 3]},
    "fractions": {"pages": [1.5]},
    "too few": {"pages": [1, 2], "tokens": 9},
    "one list for two groups": {"pages": [[1], [2]]},
    "base inside a page": {"pages": [1], "bases": [2]},
    "bases of another pool": {"pages": [1], "bases": [0, 0]},
}


@pytest.mark.parametrize("arguments", BAD_PAGES.values(), ids=BAD_PAGES.keys())
def test_bad_pages(arguments: dict[str, Any]) -> None:
    array = kv()
    pool = Pool(paged([(array,)], DIMS, block_tokens=16), [array])
    with pytest.raises(GeometryError):
        pool.bind(**arguments)
    assert pool.bind([1, 2], tokens=8).ends == (8,)


def test_groups_that_share_memory_share_page_ids() -> None:
    shared, groups = kv(), two_groups()
    pool = Pool(paged([(shared,), (shared,)], DIMS, block_tokens=16, groups=groups), [shared, shared])
    assert pool.layout.spaces == (0, 0)
    with pytest.raises(GeometryError):
        pool.bind([[1, 2], [2, 3]])
    assert pool.bind([[1, 2], [3, 4]]).named_pages() == {(0, 1), (0, 2), (0, 3), (0, 4)}
    own = [kv(), kv()]
    pool = Pool(paged([(own[0],), (own[1],)], DIMS, block_tokens=16, groups=groups), own)
    assert pool.bind([[1, 2], [2, 3]]).named_pages() == {(0, 1), (0, 2), (1, 2), (1, 3)}


def test_a_sliding_group_may_begin_later() -> None:
    own = [kv(), kv()]
    pool = Pool(paged([(own[0],), (own[1],)], DIMS, block_tokens=16, groups=two_groups()), own)
    binding = pool.bind([[0, 1, 2, 3, 4], [7, 6]], bases=[0, 12])
    assert binding.ends == (20, 20)
    binding.check(1, 0, 16, 12)
    with pytest.raises(GeometryError):
        binding.check(1, 0, 16, 11)
    assert binding.page_ids(1, 0, 16, 12).tolist() == [7]
    assert binding.page_ids(1, 16, 4, 0).tolist() == [6]


def test_memory_has_to_be_there_and_writable() -> None:
    array = kv()
    layout = paged([(array,)], DIMS, block_tokens=16)
    with pytest.raises(GeometryError):
        Pool(layout, [])
    with pytest.raises(GeometryError):
        Pool(layout, [array[:4].copy()])
    array.flags.writeable = False
    with pytest.raises(GeometryError):
        Pool(layout, [array])
    with pytest.raises(GeometryError):
        Pool(contiguous([(np.zeros((1, 2, 5, 8)),)], block_tokens=16), [])


def test_torch_memory_that_the_cpu_cannot_reach() -> None:
    torch = pytest.importorskip("torch")
    away = torch.empty((8, 4, 2, 8), device="meta")
    assert spec_of(away).shape == (8, 4, 2, 8)
    with pytest.raises(GeometryError):
        flat_bytes(away, 16)
    here = torch.zeros(16, dtype=torch.uint8)
    assert flat_bytes(here[4:], 12).size == 12
    with pytest.raises(GeometryError):
        flat_bytes(here[4:], 13)


def test_sequences_that_do_not_fit_their_layout() -> None:
    def pair(length: int = 5, heads: int = 2, dim: int = 8, dtype: str = "uint16") -> tuple[np.ndarray, ...]:
        return tuple(np.zeros((1, heads, length, dim), dtype) for _ in range(2))

    layout = contiguous([pair(), pair()], block_tokens=16)
    assert bind_sequence(layout, [pair(9), pair(9)]).ends == (9,)
    for wrong in (
        [pair()],
        [pair(), pair()[:1]],
        [pair(), pair(heads=3)],
        [pair(), pair(dim=4)],
        [pair(), pair(dtype="uint32")],
        [pair(5), pair(6)],
    ):
        with pytest.raises(GeometryError):
            bind_sequence(layout, wrong)
    with pytest.raises(GeometryError):
        bind_sequence(layout, [pair(), pair()], bases=(0, 0))
    with pytest.raises(GeometryError):
        bind_sequence(paged([(kv(),)], DIMS, block_tokens=16), [pair()])


def test_views_at_equal_distances_are_one_storage() -> None:
    array = np.zeros((4, 8, 4, 2, 8), np.uint16)
    spec = stacked(list(array))
    assert (spec.shape, spec.strides) == (array.shape, array.strides)
    with pytest.raises(GeometryError):
        stacked([array[0], array[2], array[3]])
    with pytest.raises(GeometryError):
        stacked([array[1], array[0]])
