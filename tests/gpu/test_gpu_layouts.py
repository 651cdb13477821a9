"""Stored bytes against a slow reference, and round trips, for every layout, dtype and geometry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.checksum import checksum
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.describe import contiguous, paged
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult
from kvtier.gpu.layout import LayerGroup, PoolLayout
from kvtier.gpu.pool import Binding, Pool, bind_sequence
from kvtier.testing.pool_cases import BLOCK, BUILDERS, GEOMETRIES, PAGES, Case, P, Slots, sequence


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


@pytest.mark.parametrize("transposed", [False, True])
def test_contiguous_with_a_sliding_group(engine: CpuCopyEngine, slots: Slots, transposed: bool) -> None:
    """40 tokens, layer 1 kept its last 10 rows: stored as [plane][head][row], and back into new tensors."""
    groups = (LayerGroup("full", (0,)), LayerGroup("sliding", (1,), window_tokens=11))
    source = sequence((40, 10), 13, transposed=transposed)
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
        target = sequence((40, 10), 14)
        back = item_of(layout, group, start, tokens, first_valid, check=checksum(wanted))
        assert move(engine, "scatter", bind_sequence(layout, target, bases=(0, 30)), [back]).ok
        untouched = sequence((40, 10), 14)[group]
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
