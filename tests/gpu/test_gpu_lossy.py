"""Copies under a lossy codec, for every layout: stored bytes are the codec's, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.errors import GeometryError
from kvtier.geometry import LOSSY
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.engine import CORRUPT, STALE, CopyBatch, CopyItem, CopyResult
from kvtier.gpu.layout import PoolLayout
from kvtier.gpu.pool import Binding
from kvtier.gpu.quantise import decode, encode
from kvtier.testing.pool_cases import BUILDERS, PAGES, Case, Slots

FLOATS = [(dtype, 2, 2, 8) for dtype in ("float16", "float32")]


@pytest.fixture(scope="module", params=[(b, g) for b in BUILDERS for g in FLOATS], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    build, geometry = request.param
    made: Case = build(*geometry)
    # Bytes by chance are not all finite numbers.
    chance = np.random.default_rng(1)
    for tensor in made.tensors:
        tensor[...] = chance.standard_normal(tensor.shape).astype(tensor.dtype)
    return made


@pytest.fixture
def slots() -> Slots:
    return Slots(1 << 20)


@pytest.fixture
def engine(slots: Slots) -> Iterator[CpuCopyEngine]:
    made = CpuCopyEngine(slots, threads=2)
    yield made
    made.close()


def item_of(layout: PoolLayout, codec: str, group: int, rows: tuple[int, int, int], at: int = 0) -> CopyItem:
    start, tokens, first_valid = rows
    nbytes = layout.geometry.at(codec).groups[group].object_bytes(tokens, first_valid)
    return CopyItem(group, start, tokens, first_valid, 0, 1, (0, at), nbytes)


def move(
    engine: CpuCopyEngine, direction: str, binding: Binding, items: Sequence[CopyItem], codec: str
) -> CopyResult:
    results: list[CopyResult] = []
    batch = CopyBatch("j", 0, direction, binding, tuple(items), fidelity=codec)  # type: ignore[arg-type]
    engine.submit(batch, results.append)
    assert engine.wait_idle(10)
    return results[0]


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("rows", [(0, 16, 0), (16, 5, 0), (16, 13, 3)])
def test_stored_bytes_are_the_codecs(
    case: Case, engine: CpuCopyEngine, slots: Slots, rows: tuple[int, int, int], codec: str
) -> None:
    table = np.random.default_rng(2).permutation(PAGES)[:8]
    binding, values = case.pool().bind(table), case.layout.values
    assert values is not None
    for group in range(len(case.layout.groups)):
        exact = np.frombuffer(case.expected(group, table.tolist(), *rows), np.uint8)
        wanted = np.empty(values.encoded_bytes(exact.nbytes), np.uint8)
        loss = encode(exact, values, codec, wanted)
        item = item_of(case.layout, codec, group, rows)
        result = move(engine, "gather", binding, [item], codec)
        assert result.ok
        assert item.nbytes == wanted.nbytes == result.bytes < exact.nbytes
        assert slots.view((0, 0), item.nbytes).tobytes() == wanted.tobytes()
        assert result.checksums == (checksum(wanted),)
        assert result.loss == loss


@pytest.mark.parametrize("codec", LOSSY)
def test_a_restore_writes_these_rows_and_no_others(case: Case, engine: CpuCopyEngine, codec: str) -> None:
    table = np.random.default_rng(3).permutation(PAGES)[:8]
    binding, values, rows = case.pool().bind(table), case.layout.values, (16, 13, 3)
    assert values is not None
    for group in range(len(case.layout.groups)):
        exact = np.frombuffer(case.expected(group, table.tolist(), *rows), np.uint8)
        item = item_of(case.layout, codec, group, rows)
        stored = move(engine, "gather", binding, [item], codec).checksums[0]
        kept = [tensor.copy() for tensor in case.tensors]
        for tensor in case.tensors:
            tensor[...] = 7
        poisoned = [tensor.tobytes() for tensor in case.tensors]
        arriving = CopyItem(group, *rows, 0, 1, (0, 0), item.nbytes, stored)
        assert move(engine, "scatter", binding, [arriving], codec).ok
        encoded = np.empty(item.nbytes, np.uint8)
        encode(exact, values, codec, encoded)
        wanted = np.empty(exact.nbytes, np.uint8)
        decode(encoded, values, codec, wanted)
        assert case.expected(group, table.tolist(), *rows) == wanted.tobytes()
        changed = sum(
            int((np.frombuffer(t.tobytes(), np.uint8) != np.frombuffer(p, np.uint8)).sum())
            for t, p in zip(case.tensors, poisoned, strict=True)
        )
        assert changed <= exact.nbytes
        for tensor, before in zip(case.tensors, kept, strict=True):
            tensor[...] = before


def test_what_goes_wrong_is_said(case: Case, engine: CpuCopyEngine, slots: Slots) -> None:
    binding, rows = case.pool().bind(np.arange(8)), (0, 16, 0)
    items = [item_of(case.layout, "int8", 0, rows, at) for at in (0, 1 << 18)]
    sums = move(engine, "gather", binding, items, "int8").checksums
    slots.view((0, 0), 1)[0] ^= 1
    back = [
        CopyItem(0, *rows, 0, generation, i.address, i.nbytes, s)
        for i, s, generation in zip(items, sums, (1, 2), strict=True)
    ]
    result = move(engine, "scatter", binding, back, "int8")
    assert result.failed == ((0, CORRUPT), (1, STALE))
    with pytest.raises(GeometryError, match="its slot"):
        move(engine, "gather", binding, items, "exact")
    with pytest.raises(GeometryError, match="fidelity 'int4'"):
        move(engine, "gather", binding, items, "int4")


def test_what_is_not_finite_is_not_parked(engine: CpuCopyEngine) -> None:
    case = BUILDERS[0]("float32", 2, 2, 8)
    case.tensors[0][...] = np.inf
    result = move(
        engine, "gather", case.pool().bind(np.arange(8)), [item_of(case.layout, "fp8", 0, (0, 16, 0))], "fp8"
    )
    assert not result.ok
    assert "not finite" in result.failed[0][1]
    assert result.loss.relative == 0.0


def test_a_pool_of_bytes_has_no_lossy_form() -> None:
    case = BUILDERS[0]("uint8", 2, 2, 8)
    assert case.layout.values is None
    with pytest.raises(GeometryError, match="cannot be kept at fidelity 'fp8'"):
        case.layout.geometry.at("fp8")
    with pytest.raises(GeometryError, match="is not known"):
        case.layout.geometry.at("fp4")
    geometry = case.layout.geometry
    assert geometry.at("exact") is geometry
