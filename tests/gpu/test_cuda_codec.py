"""Lossy codecs in the CUDA engine: the kernels' arithmetic on a CPU, and the engine on a fake device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtier.checksum import PIECE_BYTES, checksum
from kvtier.errors import GeometryError
from kvtier.geometry import LOSSY
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.ways import WAYS, always
from kvtier.gpu.cuda.work import LOSS, form_of
from kvtier.gpu.describe import paged
from kvtier.gpu.engine import CORRUPT, CopyBatch, CopyItem, CopyResult
from kvtier.gpu.pool import Pool
from kvtier.gpu.quantise import Values, decode, encode
from kvtier.gpu.tensors import DeviceBytes
from kvtier.testing.either_device import either_device
from kvtier.testing.fake_device_host import Prepared, compiled
from kvtier.testing.fake_device_pools import Uploaded
from kvtier.testing.fake_device_rig import Rig
from kvtier.testing.pool_cases import BUILDERS, PAGES, Case, Slots

ENCODE, DECODE, HASH = 3, 4, 5
FLOATS = ("float16", "float32")
ROWS = [(0, 16, 0), (16, 13, 3), (32, 5, 0)]


def hard_values(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """Values of every size, zeros of both signs, ties, vectors of nothing and of next to nothing.

    Where a type has them, vectors whose scale is a normal number, but what they are made of is not.
    """
    draw = np.random.default_rng(seed)
    made = draw.standard_normal(shape) * np.exp2(draw.integers(-30, 14, (*shape[:-1], 1)))
    made *= draw.choice([0.0, -0.0, 1.0, 2.0**-8, 0.5], shape, p=[0.02, 0.02, 0.9, 0.03, 0.03])
    made[draw.random(shape[:-1]) < 0.1] = 0
    if dtype == "float32":
        made[draw.random(shape[:-1]) < 0.05] = 1e-41
    made = np.round(made * 16) / 16 if seed % 2 else made
    if dtype != "float16":
        small = draw.standard_normal(shape) * np.exp2(draw.integers(-122, -112, (*shape[:-1], 1)))
        made = np.where((draw.random(shape[:-1]) < 0.1)[..., None], small, made)
    return made


def filled(case: Case, seed: int) -> Case:
    for number, tensor in enumerate(case.tensors):
        tensor[...] = hard_values(str(tensor.dtype), tensor.shape, seed + number).astype(tensor.dtype)
    return case


# -- the kernels


@pytest.fixture(scope="module")
def simt(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = ("-fsanitize=alignment", "-fno-sanitize-recover=all")
    return compiled("simt_check.cpp", tmp_path_factory.mktemp("codec"), *flags)


class Kernels:
    """Encode, hash and decode of one object, load by load, over memory of this process."""

    def __init__(self, simt: ctypes.CDLL, pool: Pool, table: Any, item: CopyItem, codec: str, load: int):
        values = pool.layout.values
        assert values is not None
        self.simt, self.item, self.form = simt, item, form_of(values, codec)
        self.ready = Prepared(pool.bind(table), [item], load, codec)
        self.loads = [load for step in self.ready.steps for load in step.loads]
        self.losses = np.zeros(1, LOSS)
        self.result = np.zeros(1, np.uint64)

    def each(self, kernel: int, extra: int, blocks: int = 2) -> None:
        for load in self.loads:
            part = load.parts[0]
            tiles = -(-load.nbytes // PIECE_BYTES) if kernel == HASH else load.tiles
            at = self.ready.segments(self.ready.work.moves + 64 * load.first)
            base = ctypes.c_uint64(int(self.ready.out.ctypes.data) + part.lo)
            self.simt.kv_simt_launch(
                kernel, at, 1, tiles, base, blocks, ctypes.c_uint64(self.form), ctypes.c_uint64(extra)
            )

    def encode(self) -> bytes:
        self.each(ENCODE, int(self.losses.ctypes.data))
        return self.ready.out[: self.item.nbytes].tobytes()

    def hash(self) -> int:
        self.each(HASH, int(self.result.ctypes.data))
        return (int(self.result[0]) + self.item.nbytes) % (1 << 64)

    def decode(self, scales: int) -> None:
        self.each(DECODE, scales)


def item_of(case: Case, codec: str, group: int, rows: tuple[int, int, int]) -> CopyItem:
    start, tokens, first = rows
    nbytes = case.layout.geometry.at(codec).groups[group].object_bytes(tokens, first)
    return CopyItem(group, start, tokens, first, 0, 1, (0, 0), nbytes)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("build", BUILDERS[::3])
def test_the_kernels_give_the_cpu_s_bytes(simt: ctypes.CDLL, build: Any, dtype: str, codec: str) -> None:
    case = filled(build(dtype, 2, 2, 8), 4)
    if case.layout.values is None:
        pytest.skip("no head's values lie side by side")
    table = [7, 3, 1, 9, 30, 31, 32, 2, 11, 12, 13, 14]
    for group, rows in ((g, r) for g in range(len(case.layout.groups)) for r in ROWS[:2]):
        exact = np.frombuffer(case.expected(group, table, *rows), np.uint8)
        wanted = np.empty(case.layout.values.encoded_bytes(exact.nbytes), np.uint8)
        loss = encode(exact, case.layout.values, codec, wanted)
        kernels = Kernels(simt, case.pool(), table, item_of(case, codec, group, rows), codec, PIECE_BYTES)
        assert kernels.encode() == wanted.tobytes()
        assert (kernels.ready.out[kernels.item.nbytes :] == 0xEE).all()
        assert kernels.hash() == checksum(wanted)
        assert kernels.losses["not_finite"][0] == 0
        assert kernels.losses["error_squares"][0] == pytest.approx(loss.error_squares)
        assert kernels.losses["value_squares"][0] == pytest.approx(loss.value_squares)
        back = np.empty(exact.nbytes, np.uint8)
        decode(wanted, case.layout.values, codec, back)
        kept = [tensor.copy() for tensor in case.tensors]
        for tensor in case.tensors:
            tensor[...] = 7
        kernels.decode(int(kernels.ready.out.ctypes.data))
        assert case.expected(group, table, *rows) == back.tobytes()
        for tensor, before in zip(case.tensors, kept, strict=True):
            tensor[...] = before


@pytest.mark.parametrize("codec", LOSSY)
def test_a_long_object_in_several_loads(simt: ctypes.CDLL, codec: str) -> None:
    """Loads end in the middle of a vector and of the scales; bf16, whose values are the upper halves."""
    tokens, heads, dim = 64, 8, 100
    real = hard_values("bfloat16", (20, 4, heads, dim), 3).astype(np.float32)
    tensor = (real.view(np.uint32) >> 16).astype(np.uint16)
    layout = replace(
        paged([(tensor,)], "page token head dim", block_tokens=tokens), values=Values("bf16", dim)
    )
    table = np.random.default_rng(2).permutation(20)[:16]
    exact = np.ascontiguousarray(tensor[table]).view(np.uint8).reshape(-1)
    values = Values("bf16", dim)
    wanted = np.empty(values.encoded_bytes(exact.nbytes), np.uint8)
    encode(exact, values, codec, wanted)
    item = CopyItem(0, 0, tokens, 0, 0, 1, (0, 0), wanted.nbytes)
    kernels = Kernels(simt, Pool(layout, [tensor]), table, item, codec, PIECE_BYTES)
    kernels.loads = _cut(kernels, 4096)
    assert kernels.encode() == wanted.tobytes()
    back = np.empty(exact.nbytes, np.uint8)
    decode(wanted, values, codec, back)
    tensor[...] = 3
    kernels.decode(int(kernels.ready.out.ctypes.data))
    assert np.ascontiguousarray(tensor[table]).tobytes() == back.tobytes()


def _cut(kernels: Kernels, nbytes: int) -> list[Any]:
    """The only load, cut finer than the engine cuts: into parts that no piece of a checksum ends."""
    from kvtier.gpu.cuda.work import SEGMENT, Load, Part

    (load,), work, size = kernels.loads, kernels.ready.work, kernels.item.nbytes
    begins = range(0, size, nbytes)
    table = np.repeat(kernels.ready.blob[work.moves : work.moves + 64].view(SEGMENT), len(begins))
    table["lo"] = list(begins)
    table["hi"] = [min(at + nbytes, size) for at in begins]
    work.moves = kernels.ready.blob.nbytes
    kernels.ready.blob = np.concatenate([kernels.ready.blob, table.view(np.uint8)])
    # The tables moved along with the blob.
    moved = kernels.ready.blob[work.moves :].view(SEGMENT)
    at, planes = work._tables[0]
    ids_at, _ = work._ids[0]
    moved["planes"] = int(kernels.ready.blob.ctypes.data) + at
    moved["ids"] = int(kernels.ready.blob.ctypes.data) + ids_at
    assert planes.nbytes
    parts = [Part(0, lo, min(lo + nbytes, size), 0) for lo in begins]
    return [Load(load.way, (part,), n, 1, part.hi - part.lo) for n, part in enumerate(parts)]


def test_every_byte_and_every_half_is_converted_as_on_the_cpu(simt: ctypes.CDLL) -> None:
    """All 256 codes through a decoder, and every float16 through the fp8 encoder, with scale 1."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.where(np.isfinite(halves) & (np.abs(halves) <= 448), halves, np.float16(0))
    # A 448 in each vector makes its scale 1.
    tensor = np.full((256, 4, 1, 65), 448, np.float16)
    tensor[..., :64] = halves.reshape(256, 4, 1, 64)
    layout = paged([(tensor,)], "page token head dim", block_tokens=1024)
    values = layout.values
    assert values is not None
    wanted = np.empty(values.encoded_bytes(tensor.nbytes), np.uint8)
    encode(tensor.reshape(-1).view(np.uint8), values, "fp8", wanted)
    item = CopyItem(0, 0, 1024, 0, 0, 1, (0, 0), wanted.nbytes)
    kernels = Kernels(simt, Pool(layout, [tensor]), range(256), item, "fp8", PIECE_BYTES)
    assert kernels.encode() == wanted.tobytes()
    assert len(set(wanted.tolist())) > 250


def test_control_values_that_are_not_finite_are_said(simt: ctypes.CDLL) -> None:
    case = filled(BUILDERS[0]("float32", 2, 2, 8), 4)
    item = item_of(case, "fp8", 0, (0, 16, 0))
    for value, said in ((1.0, 0), (np.nan, 1), (-np.inf, 1)):
        case.tensors[0][..., 0] = value
        kernels = Kernels(simt, case.pool(), range(4), item, "fp8", PIECE_BYTES)
        kernels.encode()
        assert kernels.losses["not_finite"][0] == said


# -- the engine


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    yield from either_device(request.param)


def batch(direction: Any, binding: Any, items: list[CopyItem], codec: str, **more: Any) -> CopyBatch:
    return CopyBatch("j", 0, direction, binding, tuple(items), fidelity=codec, **more)


def run(engine: CudaCopyEngine, what: CopyBatch) -> CopyResult:
    results: list[CopyResult] = []
    engine.submit(what, results.append)
    assert engine.wait_idle(30)
    return results[0]


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("build", BUILDERS)
def test_lossy_round_trips(device: Device, build: Any, dtype: str, codec: str) -> None:
    """What is stored, what it lost, and what comes back into other pages, is what the CPU's codec gives."""
    case = filled(build(dtype, 4, 2, 8), 8)
    values = case.layout.values
    if values is None:
        pytest.skip("no head's values lie side by side")
    there, slots = Uploaded(device, case), Slots(1 << 20)
    engine = CudaCopyEngine(
        device, slots, [slots.bytes], settings=Settings(always("batch"), 2, PIECE_BYTES, 1 << 19)
    )
    rng = np.random.default_rng(2)
    table, other = rng.permutation(PAGES)[:12], rng.permutation(PAGES)[:12]
    for group in range(len(case.layout.groups)):
        filled(case, 8)
        there.upload()
        items, wanted, backs, at, losses = [], [], [], 0, []
        for rows in ROWS:
            item = replace(item_of(case, codec, group, rows), address=(0, at))
            exact = np.frombuffer(case.expected(group, table.tolist(), *rows), np.uint8)
            stored, back = np.empty(item.nbytes, np.uint8), np.empty(exact.nbytes, np.uint8)
            losses.append(encode(exact, values, codec, stored))
            decode(stored, values, codec, back)
            items.append(item)
            wanted.append(stored.tobytes())
            backs.append(back.tobytes())
            at += -(-item.nbytes // 64) * 64
        slots.bytes[:] = 0xEE
        parked = run(engine, batch("gather", there.pool.bind(table), items, codec))
        assert parked.ok and parked.checksums == tuple(checksum(data) for data in wanted)
        assert [slots.view(i.address, i.nbytes).tobytes() for i in items] == wanted
        assert parked.loss.error_squares == pytest.approx(sum(each.error_squares for each in losses))
        assert parked.loss.value_squares == pytest.approx(sum(each.value_squares for each in losses))
        case.fill(3)
        there.upload()
        again = [replace(i, checksum=c) for i, c in zip(items, parked.checksums, strict=True)]
        told: list[int] = []
        layered = batch(
            "scatter",
            there.pool.bind(other),
            again,
            codec,
            on_layer=lambda n, event, told=told: told.append(n),
        )
        assert run(engine, layered).ok
        assert told == list(case.layout.groups[group].layers)
        there.download()
        assert [case.expected(group, other.tolist(), *rows) for rows in ROWS] == backs
    engine.close()
    there.close()


def test_a_long_encoded_object_passes_through_little_staging(device: Device) -> None:
    """Several loads an object, two staging slots: scales of the first are needed by the last."""
    tensor = np.random.default_rng(1).standard_normal((72, 16, 8, 64)).astype(np.float16)
    layout = paged([(tensor,)], "page token head dim", block_tokens=1024)
    values = layout.values
    assert values is not None
    slots = Slots(1 << 20)
    address = device.allocate(tensor.nbytes)
    pinned, stream = device.pinned(tensor.nbytes), device.stream()
    pinned[:] = tensor.reshape(-1).view(np.uint8)
    device.copy(address, int(pinned.ctypes.data), tensor.nbytes, stream)
    mark(device, stream).synchronize()
    pool = Pool(layout, [DeviceBytes(address, tensor.nbytes, device.location, None)])
    engine = CudaCopyEngine(device, slots, [slots.bytes], settings=Settings(always("batch"), 2, PIECE_BYTES))
    table = np.random.default_rng(2).permutation(72)[:64]
    exact = np.ascontiguousarray(tensor[table]).view(np.uint8).reshape(-1)
    wanted, back = np.empty(values.encoded_bytes(exact.nbytes), np.uint8), np.empty(exact.nbytes, np.uint8)
    encode(exact, values, "fp8", wanted)
    decode(wanted, values, "fp8", back)
    item = CopyItem(0, 0, 1024, 0, 0, 1, (0, 0), wanted.nbytes)
    parked = run(engine, batch("gather", pool.bind(table), [item], "fp8"))
    assert parked.checksums == (checksum(wanted),)
    assert run(
        engine, batch("scatter", pool.bind(table), [replace(item, checksum=parked.checksums[0])], "fp8")
    ).ok
    device.copy(int(pinned.ctypes.data), address, tensor.nbytes, stream)
    mark(device, stream).synchronize()
    got = pinned.view(np.float16).reshape(tensor.shape)[table]
    assert np.ascontiguousarray(got).tobytes() == back.tobytes()
    engine.close()
    device.free(address)
    device.free_pinned(pinned)
    device.destroy_stream(stream)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["registered", "allocation"])
def test_a_flipped_bit_of_encoded_bytes_is_seen(way: Any, where: str) -> None:
    """On its way to the host, or in staging on the way back."""
    case = filled(BUILDERS[0]("float16", 4, 2, 8), 2)
    rig = Rig(Settings(always(way), 2, PIECE_BYTES), case.tensors)
    binding, item = case.pool().bind(range(4)), item_of(case, "int8", 0, (0, 16, 0))
    if where == "registered":
        rig.device.flip_next = where
    parked = rig.move("gather", binding, [item], fidelity="int8")
    if where == "allocation":
        # Descriptors go up first; a bit of theirs would be another fault.
        rig.slots.view((0, 0), 1)[0] ^= 1
    back = rig.move("scatter", binding, [replace(item, checksum=parked.checksums[0])], fidelity="int8")
    assert back.failed == ((0, CORRUPT),)
    rig.close()


def test_staging_below_a_piece_of_the_checksum_is_refused() -> None:
    case = filled(BUILDERS[0]("float16", 4, 2, 8), 2)
    rig = Rig(Settings(always("staged"), 2, 8192), case.tensors)
    result = rig.move(
        "gather", case.pool().bind(range(4)), [item_of(case, "fp8", 0, (0, 16, 0))], fidelity="fp8"
    )
    assert not result.ok and "staging slot" in result.failed[0][1]
    rig.close()


def test_what_is_not_finite_is_not_parked() -> None:
    case = filled(BUILDERS[0]("float32", 4, 2, 8), 2)
    case.tensors[0][...] = np.inf
    rig = Rig(Settings(always("staged"), 2, PIECE_BYTES), case.tensors)
    items = [item_of(case, "fp8", 0, (0, 16, 0))]
    result = rig.move("gather", case.pool().bind(range(4)), items, fidelity="fp8")
    assert not result.ok and "not finite" in result.failed[0][1] and result.loss.relative == 0
    rig.close()


def test_a_pool_of_bytes_has_no_lossy_form() -> None:
    case = BUILDERS[0]("uint8", 4, 2, 8)
    case.fill(1)
    rig = Rig(Settings(always("staged"), 2, PIECE_BYTES), case.tensors)
    item = CopyItem(0, 0, 16, 0, 0, 1, (0, 0), 64)
    with pytest.raises(GeometryError):
        rig.move("gather", case.pool().bind(range(4)), [item], fidelity="int8")
    rig.close()
