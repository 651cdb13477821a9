"""The CUDA engine on a fake device against a slow reference: every layout, way and order of events."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.checksum import checksum
from kvtier.gpu.cuda.ways import WAYS, Way
from kvtier.gpu.describe import contiguous, cross_layer
from kvtier.gpu.engine import CopyItem
from kvtier.gpu.layout import LayerGroup, PoolLayout
from kvtier.gpu.pool import Pool, bind_sequence
from kvtier.testing.fake_device_rig import Rig, small
from kvtier.testing.pool_cases import BLOCK, BUILDERS, GEOMETRIES, PAGES, Case, sequence


def item_of(
    layout: PoolLayout,
    group: int,
    rows: tuple[int, int, int],
    slot: int = 0,
    offset: int = 0,
    check: int | None = None,
) -> CopyItem:
    start, tokens, first_valid = rows
    nbytes = layout.geometry.groups[group].object_bytes(tokens, first_valid)
    return CopyItem(group, start, tokens, first_valid, slot, 1, (0, offset), nbytes, check)


def every_item(layout: PoolLayout, blocks: list[tuple[int, int, int]]) -> list[CopyItem]:
    items, at = [], 0
    for group, rows in product(range(len(layout.groups)), blocks):
        items.append(item_of(layout, group, rows, offset=at))
        at += -(-items[-1].nbytes // 64) * 64
    return items


BLOCKS = [(0, 16, 0), (16, 16, 6), (32, 5, 0)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[3]], ids=str)
def test_stored_bytes_and_the_way_back(
    build: type[Case], geometry: tuple[str, int, int, int], way: Way
) -> None:
    """Gather against the slow reference; then poison, scatter to other pages, and look again."""
    case: Case = build(*geometry)
    case.fill(1)
    rng = np.random.default_rng(2)
    table, other = rng.permutation(PAGES)[:12], rng.permutation(PAGES)[:12]
    rig = Rig(small(way), case.tensors, seed=3)
    pool = case.pool()
    items = every_item(case.layout, BLOCKS)
    wanted = [case.expected(i.group, table.tolist(), i.start, i.tokens, i.first_valid) for i in items]
    result = rig.move("gather", pool.bind(table), items)
    assert result.ok and result.checksums == tuple(checksum(data) for data in wanted)
    for item, data in zip(items, wanted, strict=True):
        assert rig.slots.view(item.address, item.nbytes).tobytes() == data
    case.fill(4)
    # Groups of one case share its pages, so each goes back by itself.
    for item, data in zip(items, wanted, strict=True):
        back = item_of(
            case.layout,
            item.group,
            (item.start, item.tokens, item.first_valid),
            0,
            item.address[1],
            checksum(data),
        )
        assert rig.move("scatter", pool.bind(other), [back]).ok
        assert case.expected(item.group, other.tolist(), item.start, item.tokens, item.first_valid) == data
    rig.close()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_rows_pages_ways_and_interleavings(data: st.DataObject) -> None:
    """Several objects in one batch, staging of any size, streams in any order, layer by layer or not."""
    build = data.draw(st.sampled_from(BUILDERS))
    case: Case = build("uint16", 3, 2, 4)
    case.fill(11)
    table = data.draw(st.permutations(range(PAGES)))[:12]
    blocks = []
    for start in (0, 16, 32):
        tokens = data.draw(st.integers(1, BLOCK))
        blocks.append((start, tokens, data.draw(st.integers(0, tokens - 1))))
    way = data.draw(st.sampled_from(WAYS))
    slot_bytes = data.draw(st.sampled_from([4096, 8192, 1 << 16]))
    ahead = data.draw(st.sampled_from([1, 5000, 1 << 20]))
    settings_ = small(way, slot_bytes, ahead, data.draw(st.integers(1, 3)))
    rig = Rig(settings_, case.tensors, seed=data.draw(st.integers(0, 1 << 16)))
    items = every_item(case.layout, blocks)
    told: list[int] = []
    more = {"on_layer": lambda layer, event: told.append(layer)} if data.draw(st.booleans()) else {}
    verify = data.draw(st.booleans())
    binding = case.pool().bind(table)
    result = rig.move("gather", binding, items, verify, **more)
    wanted = [case.expected(i.group, table, i.start, i.tokens, i.first_valid) for i in items]
    assert result.ok
    for item, stored in zip(items, wanted, strict=True):
        assert rig.slots.view(item.address, item.nbytes).tobytes() == stored
    assert result.checksums == tuple(checksum(d) if verify else None for d in wanted)
    layers = sorted(layer for group in case.layout.groups for layer in group.layers)
    assert told == (layers if more else [])
    case.fill(12)
    again = [
        item_of(case.layout, i.group, (i.start, i.tokens, i.first_valid), 0, i.address[1], checksum(d))
        for i, d in zip(items, wanted, strict=True)
    ]
    assert rig.move("scatter", binding, again, verify, **more).ok
    for item, stored in zip(items, wanted, strict=True):
        assert case.expected(item.group, table, item.start, item.tokens, item.first_valid) == stored
    rig.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transposed", [False, True])
def test_contiguous_with_a_sliding_group(way: Way, transposed: bool) -> None:
    groups = (LayerGroup("full", (0,)), LayerGroup("sliding", (1,), window_tokens=11))
    source = sequence((40, 10), 13, transposed=transposed)
    layout = contiguous(source, block_tokens=16, groups=groups)
    target = sequence((40, 10), 14)
    rig = Rig(small(way), [t for pair in (*source, *target) for t in pair])
    binding = bind_sequence(layout, source, bases=(0, 30))
    for group, rows in ((0, (16, 16, 0)), (0, (32, 8, 0)), (1, (16, 16, 14)), (1, (32, 8, 0))):
        start, tokens, first_valid = rows
        lo, hi = start + first_valid - (0, 30)[group], start + tokens - (0, 30)[group]
        wanted = b"".join(t[0, head, lo:hi].tobytes() for t in source[group] for head in range(3))
        item = item_of(layout, group, rows)
        assert rig.move("gather", binding, [item]).checksums == (checksum(wanted),)
        assert rig.slots.view((0, 0), item.nbytes).tobytes() == wanted
        back = item_of(layout, group, rows, check=checksum(wanted))
        assert rig.move("scatter", bind_sequence(layout, target, bases=(0, 30)), [back]).ok
        for t, s in zip(target[group], source[group], strict=True):
            assert (t[0, :, lo:hi] == s[0, :, lo:hi]).all()
    rig.close()


def test_objects_of_several_checksum_pieces() -> None:
    """Longer than 256 KiB, longer than a load, in a storage whose pages hold all layers."""
    rng = np.random.default_rng(5)
    tensor = rng.integers(0, 65536, (20, 4, 2, 16, 8, 128), dtype=np.uint16)
    layout = cross_layer(tensor, "page layer kv token head dim", block_tokens=64)
    rig = Rig(small("staged", 1 << 16, 1 << 17), [tensor])
    rows = (64, 61, 3)
    item = item_of(layout, 0, rows)
    assert item.nbytes > 3 * (1 << 18)
    wanted = case_bytes(tensor, [9, 2, 3, 4], 3, 61)
    result = rig.move("gather", Pool(layout, [tensor]).bind([0, 1, 5, 6, 9, 2, 3, 4]), [item])
    assert rig.slots.view((0, 0), item.nbytes).tobytes() == wanted
    assert result.checksums == (checksum(wanted),)
    rig.close()


def case_bytes(tensor: np.ndarray, pages: list[int], first: int, last: int) -> bytes:
    parts = []
    for n, page in enumerate(pages):
        lo, hi = max(0, first - 16 * n), min(16, last - 16 * n)
        parts.append(tensor[page, :, :, lo:hi].tobytes())
    return b"".join(parts)
