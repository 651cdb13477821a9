"""Stored bytes against a slow reference, and round trips, for every layout, dtype and geometry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.checksum import checksum
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.describe import contiguous, cross_layer, paged
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult
from kvtier.gpu.layout import LayerGroup, PoolLayout
from kvtier.gpu.pool import Binding, Pool, bind_sequence

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


@pytest.fixture(scope="module", params=[(b, g) for b in BUILDERS for g in GEOMETRIES], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    build, geometry = request.param
    made: Case = build(*geometry)
    return made


@pytest.fixture(scope="module")
def slots() -> Slots:
    return Slots(1 << 20)


@pytest.fixture(scope="module")
def engine(slots: Slots) -> Iterator[CpuCopyEngine]:
    made = CpuCopyEngine(slots, threads=2)
    yield made
    made.close()


def move(
    engine: CpuCopyEngine, direction: str, binding: Binding, items: Sequence[CopyItem], verify: bool = True
) -> CopyResult:
    results: list[CopyResult] = []
    engine.submit(CopyBatch("j", 0, direction, binding, tuple(items), verify), results.append)  # type: ignore[arg-type]
    assert engine.wait_idle(10)
    return results[0]


def item_of(
    layout: PoolLayout,
    group: int,
    start: int,
    tokens: int,
    first_valid: int = 0,
    offset: int = 0,
    check: int | None = None,
) -> CopyItem:
    nbytes = layout.geometry.groups[group].object_bytes(tokens, first_valid)
    return CopyItem(group, start, tokens, first_valid, 0, 1, (0, offset), nbytes, check)


BLOCKS = [(0, 16, 0), (16, 16, 0), (16, 5, 0), (0, 1, 0), (16, 16, 6), (16, 13, 3), (16, 3, 1), (0, 16, 8)]


@pytest.mark.parametrize(("start", "tokens", "first_valid"), BLOCKS)
def test_stored_bytes_are_the_references(
    case: Case, engine: CpuCopyEngine, slots: Slots, start: int, tokens: int, first_valid: int
) -> None:
    case.fill(1)
    pool = case.pool()
    table = np.random.default_rng(2).permutation(PAGES)[:8]
    binding = pool.bind(table)
    for group in range(len(case.layout.groups)):
        item = item_of(case.layout, group, start, tokens, first_valid)
        wanted = case.expected(group, table.tolist(), start, tokens, first_valid)
        result = move(engine, "gather", binding, [item])
        assert result.ok
        got = slots.view((0, 0), item.nbytes).tobytes()
        assert got == wanted
        assert item.nbytes == len(wanted) == result.bytes
        assert result.checksums == (checksum(wanted),)


def test_round_trip_into_other_pages(case: Case, engine: CpuCopyEngine, slots: Slots) -> None:
    """Gather, poison everything, scatter to other pages: the rows are back, and no other byte changed."""
    case.fill(3)
    pool, layout = case.pool(), case.layout
    rng = np.random.default_rng(4)
    table, other = rng.permutation(PAGES)[:10], rng.permutation(PAGES)[:10]
    blocks = [(0, 16), (16, 16), (32, 7)]
    for group in range(len(layout.groups)):
        case.fill(5)
        kept = [case.expected(group, table.tolist(), start, tokens, 0) for start, tokens in blocks]
        items, at = [], 0
        for start, tokens in blocks:
            items.append(item_of(layout, group, start, tokens, offset=at))
            at += items[-1].nbytes
        sums = move(engine, "gather", pool.bind(table), items).checksums
        case.fill(6)
        before = [tensor.tobytes() for tensor in case.tensors]
        again = [
            item_of(layout, group, i.start, i.tokens, 0, i.address[1], s)
            for i, s in zip(items, sums, strict=True)
        ]
        assert move(engine, "scatter", pool.bind(other), again).ok
        for (start, tokens), wanted in zip(blocks, kept, strict=True):
            assert case.expected(group, other.tolist(), start, tokens, 0) == wanted
        after = [tensor.tobytes() for tensor in case.tensors]
        changed = sum(
            int((np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)).sum())
            for a, b in zip(before, after, strict=True)
        )
        assert 0 < changed <= sum(item.nbytes for item in items) * _times_seen(case)


def _times_seen(case: Case) -> int:
    """Views of one storage show each byte several times."""
    return len(case.tensors) if case.tensors[0].base is not None else 1


def test_order_does_not_depend_on_pages(case: Case, engine: CpuCopyEngine, slots: Slots) -> None:
    """The same rows in neighbouring and in scattered pages are stored alike."""
    case.fill(7)
    pool, layout = case.pool(), case.layout
    scattered = [31, 2, 17, 8]
    for group in range(len(layout.groups)):
        item = item_of(layout, group, 0, 14)
        sums = move(engine, "gather", pool.bind(scattered), [item]).checksums
        stored = slots.view((0, 0), item.nbytes).tobytes()
        back = item_of(layout, group, 0, 14, check=sums[0])
        assert move(engine, "scatter", pool.bind([20, 21, 22, 23]), [back]).ok
        slots.view((0, 0), item.nbytes)[:] = 0
        move(engine, "gather", pool.bind([20, 21, 22, 23]), [item])
        assert slots.view((0, 0), item.nbytes).tobytes() == stored


def test_stale_rows_never_leak_into_a_tail(case: Case, engine: CpuCopyEngine, slots: Slots) -> None:
    """Two owners of a page, same tail rows, other leftovers: the stored tails are equal."""
    pool, layout = case.pool(), case.layout
    for group in range(len(layout.groups)):
        item = item_of(layout, group, 0, 6)
        stored = []
        case.fill(8)
        checks = move(engine, "gather", pool.bind([1, 2]), [item]).checksums
        kept = slots.view((0, 0), item.nbytes).tobytes()
        for poison in (9, 10):
            case.fill(poison)
            slots.view((0, 0), item.nbytes)[:] = np.frombuffer(kept, np.uint8)
            move(engine, "scatter", pool.bind([5, 3]), [item_of(layout, group, 0, 6, check=checks[0])])
            slots.bytes[:] = 0
            move(engine, "gather", pool.bind([5, 3]), [item])
            stored.append(slots.bytes.tobytes())
        assert stored[0] == stored[1]
        assert stored[0][: item.nbytes] == kept
        # Control: a whole page would have shown the leftovers.
        whole = item_of(layout, group, 0, 8)
        move(engine, "gather", pool.bind([5, 3]), [whole])
        assert slots.view((0, 0), whole.nbytes).tobytes() != stored[0][: whole.nbytes]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_length_and_any_pages(data: st.DataObject) -> None:
    build = data.draw(st.sampled_from(BUILDERS))
    case: Case = build("uint16", 2, 2, 4)
    case.fill(11)
    group = data.draw(st.integers(0, len(case.layout.groups) - 1))
    table = data.draw(st.permutations(range(PAGES)))[:8]
    start = data.draw(st.sampled_from([0, 16]))
    tokens = data.draw(st.integers(1, BLOCK))
    first_valid = data.draw(st.integers(0, tokens - 1))
    slots = Slots(1 << 16)
    engine = CpuCopyEngine(slots, threads=1)
    try:
        item = item_of(case.layout, group, start, tokens, first_valid)
        result = move(engine, "gather", case.pool().bind(table), [item])
    finally:
        engine.close()
    wanted = case.expected(group, table, start, tokens, first_valid)
    assert slots.bytes[: item.nbytes].tobytes() == wanted
    assert bool((slots.bytes[item.nbytes :] == 0xEE).all())
    assert result.checksums == (checksum(wanted),)


@pytest.mark.parametrize("verify", [True, False])
def test_blocks_of_many_pieces(verify: bool) -> None:
    """Objects far longer than a checksum piece, cut into several units, with pieces across their borders."""
    layers = [(np.zeros((40, 16, 8, 64), np.uint16), np.zeros((40, 16, 8, 64), np.uint16)) for _ in range(8)]
    rng = np.random.default_rng(12)
    for pair in layers:
        for tensor in pair:
            tensor[:] = rng.integers(0, 65536, tensor.shape, dtype=np.uint16)
    layout = paged(layers, "page token head dim", block_tokens=512)
    pool = Pool(layout, [tensor for pair in layers for tensor in pair])
    slots = Slots(layout.geometry.groups[0].object_bytes(512))
    engine = CpuCopyEngine(slots, threads=3)
    table = rng.permutation(40)[:32]
    try:
        for tokens, first_valid in ((512, 0), (511, 0), (301, 0), (512, 77), (100, 99)):
            item = item_of(layout, 0, 0, tokens, first_valid)
            result = move(engine, "gather", pool.bind(table), [item], verify)
            wanted = b"".join(
                t[table].reshape(512, -1)[first_valid:tokens].tobytes() for pair in layers for t in pair
            )
            stored = slots.view((0, 0), item.nbytes).tobytes()
            assert stored == wanted
            assert result.checksums == ((checksum(wanted),) if verify else (None,))
            kept = [t[table].copy() for pair in layers for t in pair]
            for pair in layers:
                for t in pair:
                    t[table] = 0
            back = item_of(layout, 0, 0, tokens, first_valid, check=checksum(wanted))
            assert move(engine, "scatter", pool.bind(table), [back], verify).ok
            for t, old in zip([t for pair in layers for t in pair], kept, strict=True):
                rows, before = t[table].reshape(512, -1), old.reshape(512, -1)
                assert (rows[first_valid:tokens] == before[first_valid:tokens]).all()
                t[table] = old
    finally:
        engine.close()


@pytest.mark.parametrize("where", ["apart", "between"])
@pytest.mark.parametrize("verify", [True, False])
def test_one_call_for_many_planes(where: str, verify: bool) -> None:
    """Planes at page-aligned distances move together, unless the slot lies between them."""
    room = np.zeros(1 << 21, np.uint8)
    shape, planes = (16, 16, 2, 64), range(0, 16 << 16, 1 << 16)
    tensors = [room[at : at + (1 << 16)].view(np.uint16).reshape(shape) for at in planes]
    tensors[-1] = room[-(1 << 16) :].view(np.uint16).reshape(shape)
    room[:] = np.random.default_rng(15).integers(0, 256, room.size, dtype=np.uint8)
    layout = paged(
        list(zip(tensors[::2], tensors[1::2], strict=True)), "page token head dim", block_tokens=128
    )
    pool = Pool(layout, tensors)
    assert pool.spans[0] is not None
    slots = Slots(1 << 19)
    if where == "between":
        slots.bytes = room[1 << 20 : (1 << 20) + (1 << 19)]
    assert pool.spans[0].apart_from(slots.bytes) == (where == "apart")
    engine = CpuCopyEngine(slots, threads=2)
    table = [9, 3, 4, 5, 15, 0, 1, 7]
    try:
        for tokens, first_valid in ((128, 0), (64, 0), (100, 0), (128, 40)):
            item = item_of(layout, 0, 0, tokens, first_valid)
            result = move(engine, "gather", pool.bind(table), [item], verify)
            rows = [t[table].reshape(128, -1)[first_valid:tokens] for t in tensors]
            wanted = b"".join(r.tobytes() for r in rows)
            assert slots.bytes[: item.nbytes].tobytes() == wanted
            assert result.checksums == ((checksum(wanted),) if verify else (None,))
            other = [8, 2, 6, 10, 11, 12, 13, 14]
            back = item_of(layout, 0, 0, tokens, first_valid, check=checksum(wanted))
            assert move(engine, "scatter", pool.bind(other), [back], verify).ok
            for t, r in zip(tensors, rows, strict=True):
                assert (t[other].reshape(128, -1)[first_valid:tokens] == r).all()
    finally:
        engine.close()


def test_planes_that_are_not_alike_move_one_by_one() -> None:
    room = np.zeros(1 << 17, np.uint8)
    k = room[: 1 << 16].view(np.uint16).reshape(16, 16, 2, 64)
    v = room[1 << 16 : (1 << 16) + (1 << 15)].view(np.uint16).reshape(16, 16, 1, 64)
    assert Pool(paged([(k, v)], "page token head dim", block_tokens=16), [k, v]).spans == (None,)
    close = room[(1 << 16) - 64 : (1 << 17) - 64].view(np.uint16).reshape(16, 16, 2, 64)
    assert Pool(paged([(k, close)], "page token head dim", block_tokens=16), [k, close]).spans == (None,)


# -- contiguous caches


def _sequence(layout_lengths: Sequence[int], seed: int, *, transposed: bool = False) -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(seed)
    made = []
    for length in layout_lengths:
        shape = (1, length, 3, 8) if transposed else (1, 3, length, 8)
        pair = [rng.integers(0, 65536, shape, dtype=np.uint16) for _ in range(2)]
        made.append(tuple(t.transpose(0, 2, 1, 3) if transposed else t for t in pair))
    return made


@pytest.mark.parametrize("transposed", [False, True])
def test_contiguous_with_a_sliding_group(engine: CpuCopyEngine, slots: Slots, transposed: bool) -> None:
    """40 tokens, layer 1 kept its last 10 rows: stored as [plane][head][row], and back into new tensors."""
    groups = (LayerGroup("full", (0,)), LayerGroup("sliding", (1,), window_tokens=11))
    source = _sequence((40, 10), 13, transposed=transposed)
    layout = contiguous(source, block_tokens=16, groups=groups)
    binding = bind_sequence(layout, source, bases=(0, 30))
    for group, start, tokens, first_valid in ((0, 16, 16, 0), (0, 32, 8, 0), (1, 16, 16, 14), (1, 32, 8, 0)):
        item = item_of(layout, group, start, tokens, first_valid)
        result = move(engine, "gather", binding, [item])
        base = (0, 30)[group]
        lo, hi = start + first_valid - base, start + tokens - base
        wanted = b"".join(t[0, head, lo:hi].tobytes() for t in source[group] for head in range(3))
        assert slots.view((0, 0), item.nbytes).tobytes() == wanted
        assert result.checksums == (checksum(wanted),)
        target = _sequence((40, 10), 14)
        back = item_of(layout, group, start, tokens, first_valid, check=checksum(wanted))
        assert move(engine, "scatter", bind_sequence(layout, target, bases=(0, 30)), [back]).ok
        untouched = _sequence((40, 10), 14)[group]
        for t, s, u in zip(target[group], source[group], untouched, strict=True):
            u[0, :, lo:hi] = s[0, :, lo:hi]
            assert (t == u).all()


def test_torch_tensors_without_copies(engine: CpuCopyEngine, slots: Slots) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        raw = torch.randint(0, 256, (2 * PAGES * P * 2 * 8 * 4,), dtype=torch.uint8)
        whole = raw.view(dtype)[: 2 * PAGES * P * 2 * 8].reshape(2, PAGES, P, 2, 8)
        layout = paged([(whole,)], "kv page token head dim", block_tokens=BLOCK)
        pool = Pool(layout, [whole])
        item = item_of(layout, 0, 0, 16)
        move(engine, "gather", pool.bind([9, 1, 7, 2]), [item])
        picked = whole[:, [9, 1, 7, 2]].contiguous().view(torch.uint8).numpy().tobytes()
        assert slots.view((0, 0), item.nbytes).tobytes() == picked
        back = item_of(layout, 0, 0, 16, check=checksum(picked))
        assert move(engine, "scatter", pool.bind([3, 4, 5, 6]), [back]).ok
        assert whole[:, 3:7].contiguous().view(torch.uint8).numpy().tobytes() == picked


# -- names of stored orders


def test_interchangeable_layouts_have_one_id() -> None:
    geometry = ("uint16", 4, 2, 8)
    assert separate_k_v(*geometry).layout.layout_id == kv_outside(*geometry).layout.layout_id
    assert heads_outside(*geometry).layout.layout_id == across_layer_outermost(*geometry).layout.layout_id
    other_pages = np.zeros((10, 8, 2, 8), np.uint16)
    same = paged([(other_pages, other_pages)] * 4, "page token head dim", block_tokens=BLOCK)
    assert same.layout_id == separate_k_v(*geometry).layout.layout_id
    block_pages = np.zeros((10, 3, BLOCK, 8), np.uint16)
    by_block = paged([(block_pages, block_pages)] * 2, "page head token dim", block_tokens=BLOCK)
    assert by_block.layout_id == contiguous(_sequence((5, 5), 0), block_tokens=BLOCK).layout_id


def test_layouts_that_differ_have_other_ids() -> None:
    kinds = [
        separate_k_v,
        kv_in_page,
        heads_outside,
        latent,
        across,
        across_token_outside,
        across_views,
        two_groups,
    ]
    ids = [build("uint16", 4, 2, 8).layout.layout_id for build in kinds]
    ids.append(separate_k_v("float32", 4, 2, 8).layout.layout_id)
    ids.append(separate_k_v("uint16", 4, 4, 8).layout.layout_id)
    page8 = np.zeros((10, 2, 8, 2, 8), np.uint16)
    ids.append(paged([(page8,)] * 4, "page kv token head dim", block_tokens=BLOCK).layout_id)
    ids.append(contiguous(_sequence((5, 5), 0), block_tokens=BLOCK).layout_id)
    assert len(set(ids)) == len(ids)


def test_geometry_of_known_models() -> None:
    bf16 = np.zeros((2, 16, 8, 128), np.uint16)
    llama = paged([(bf16, bf16)] * 32, "page token head dim", block_tokens=256)
    assert llama.geometry.token_bytes == 131_072
    assert (llama.geometry.block_tokens, llama.geometry.page_tokens) == (256, 16)
    mla = np.zeros((2, 16, 576), np.uint16)
    deepseek = paged([(mla,)] * 61, "page token dim", block_tokens=256)
    assert deepseek.geometry.token_bytes == 70_272
    with_groups = two_groups("uint16", 4, 2, 8).layout.geometry
    assert [(g.kind, g.window_tokens) for g in with_groups.groups] == [("full", 0), ("sliding", 8)]
