"""What is asked of a device and of the engine on it, on the fake here and on a GPU where there is one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kvtier.bench.gpu import gpu_copies
from kvtier.bench.llama import BLOCK_BYTES
from kvtier.checksum import checksum
from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda.cupy_device import CudaDevice
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import CudaPlace
from kvtier.gpu.cuda.measure import WayRates, bind_scratch, copy_once, fit
from kvtier.gpu.cuda.ways import WAYS, Way, always
from kvtier.gpu.describe import paged
from kvtier.gpu.engine import CopyBatch, CopyItem, CopyResult, StreamEvent
from kvtier.gpu.layers import LayerEvents
from kvtier.gpu.places import location_of, place_of
from kvtier.gpu.pool import Pool
from kvtier.testing.either_device import either_device
from kvtier.testing.fake_device_pools import Uploaded
from kvtier.testing.pool_cases import BUILDERS, GEOMETRIES, PAGES, Case, Slots


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    yield from either_device(request.param)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_round_trips_are_bit_exact(
    device: Device, build: type[Case], geometry: tuple[str, int, int, int], way: Way
) -> None:
    """Random data, all layouts and dtypes, small staging; poisoned before, to other pages, layer by layer."""
    case: Case = build(*geometry)
    case.fill(1)
    there, slots = Uploaded(device, case), Slots(1 << 20)
    engine = CudaCopyEngine(device, slots, [slots.bytes], settings=Settings(always(way), 2, 8192, 1 << 16))
    rng = np.random.default_rng(2)
    table, other = rng.permutation(PAGES)[:12], rng.permutation(PAGES)[:12]
    for group in range(len(case.layout.groups)):
        items, at = [], 0
        for start, tokens, first in ((0, 16, 0), (16, 16, 6), (32, 5, 0)):
            nbytes = case.layout.geometry.groups[group].object_bytes(tokens, first)
            items.append(CopyItem(group, start, tokens, first, 0, 1, (0, at), nbytes))
            at += -(-nbytes // 64) * 64
        case.fill(1)
        there.upload()
        wanted = [case.expected(group, table.tolist(), i.start, i.tokens, i.first_valid) for i in items]
        slots.bytes[:] = 0xEE
        _, parked = copy_once(engine, "gather", there.pool.bind(table), items, True)
        assert parked.checksums == tuple(checksum(data) for data in wanted)
        assert [slots.view(i.address, i.nbytes).tobytes() for i in items] == wanted
        case.fill(3)
        there.upload()
        again = [replace(i, checksum=c) for i, c in zip(items, parked.checksums, strict=True)]
        told: list[int] = []
        batch = CopyBatch("r", 0, "scatter", there.pool.bind(other), tuple(again))
        batch = replace(batch, on_layer=lambda layer, event, told=told: told.append(layer))
        answers: list[bool] = []
        engine.submit(batch, lambda result, answers=answers: answers.append(result.ok))
        assert engine.wait_idle(30) and answers == [True]
        assert told == list(case.layout.groups[group].layers)
        before = [flat.tobytes() for flat in case.tensors]
        there.download()
        got = [case.expected(group, other.tolist(), i.start, i.tokens, i.first_valid) for i in again]
        assert got == wanted
        assert len(before) == len(case.tensors)
    engine.close()
    there.close()


def test_checksums_of_long_objects(device: Device) -> None:
    """Several pieces and a rest of every kind, hashed where the bytes are."""
    nbytes = 5 << 18
    rates = WayRates(device, nbytes, objects=1)
    for piece in (1 << 12, 3000):
        size = nbytes - nbytes % piece
        binding, items = bind_scratch(rates._pool, piece, size, 1)
        _, result = copy_once(rates.engine, "gather", binding, items, True)
        stored = rates.engine._slots.view((0, 0), size)
        assert result.checksums == (checksum(stored.tobytes()),)
    rates.close()


def test_events_and_streams(device: Device) -> None:
    """Order across streams, time between events, and a copy that is done only after its event."""
    one, two = device.stream(), device.stream()
    begin, end = device.event(timed=True), device.event(timed=True)
    host, address = device.pinned(1 << 16), device.allocate(1 << 16)
    host[:] = np.arange(1 << 16, dtype=np.uint32).view(np.uint8)[: 1 << 16]
    wanted = host.tobytes()
    device.record(begin, one)
    device.copy(address, int(host.ctypes.data), host.nbytes, one)
    mark(device, one).wait(two)
    back = device.pinned(1 << 16)
    device.copy(int(back.ctypes.data), address, host.nbytes, two)
    device.record(end, two)
    device.synchronize(end)
    assert device.done(begin) and device.done(end)
    assert back.tobytes() == wanted and device.elapsed_s(begin, end) > 0
    for memory in (host, back):
        device.free_pinned(memory)
    device.free(address)
    for event in (begin, end):
        device.destroy_event(event)
    for stream in (one, two):
        device.destroy_stream(stream)


def test_batched_copies(device: Device) -> None:
    source, target = device.pinned(1 << 16), device.allocate(1 << 16)
    source[:] = np.random.default_rng(1).integers(0, 256, 1 << 16, dtype=np.uint8)
    wanted = source.copy()
    stream = device.stream()
    order = np.random.default_rng(2).permutation(256).astype(np.uint64) * np.uint64(256)
    sizes = np.full(256, 256, np.uint64)
    there = np.uint64(target) + order
    device.copy_batch(there, np.uint64(int(source.ctypes.data)) + order, sizes, stream)
    mark(device, stream).synchronize()
    source[:] = 0
    device.copy(int(source.ctypes.data), target, source.nbytes, stream)
    mark(device, stream).synchronize()
    assert (source == wanted).all()
    device.free_pinned(source)
    device.free(target)
    device.destroy_stream(stream)


def test_a_table_is_fitted(device: Device) -> None:
    table = fit(device, (256, 4096), 1 << 16)
    for rows in (table.gather, table.scatter):
        assert rows[-1][0] == 1 << 62 and {way for _, way in rows} <= set(WAYS)


def test_layers_of_a_restore_over_several_batches(device: Device) -> None:
    """A layer is there when the last batch has it; a stream that waits reads the restored bytes."""
    case: Case = BUILDERS[1]("uint16", 4, 2, 8)
    case.fill(1)
    there, slots = Uploaded(device, case), Slots(1 << 20)
    engine = CudaCopyEngine(device, slots, [slots.bytes], settings=Settings(always("staged"), 2, 8192))
    binding = there.pool.bind(range(8))
    nbytes = case.layout.geometry.groups[0].object_bytes(16)
    items = [CopyItem(0, 16 * n, 16, 0, n, 1, (0, n * nbytes), nbytes) for n in range(2)]
    sums = copy_once(engine, "gather", binding, items, True)[1].checksums
    ready = LayerEvents(case.layout)
    prefill = device.stream()
    assert not ready.wait(0, prefill, 0)
    for n, item in enumerate(items):
        mine = (replace(item, checksum=sums[n]),)
        part = ready.begin(mine, last=n == 1)
        assert part is not None
        batch = CopyBatch("r", n, "scatter", binding, mine, on_layer=part.on_layer)
        engine.submit(batch, lambda result, part=part: part.ended(result.ok))
        assert engine.wait_idle(30)
        assert [ready.ready(layer) for layer in range(4)] == [n == 1] * 4
    assert all(ready.wait(layer, prefill, 10) for layer in range(4))
    del part
    del ready, batch
    engine.close()
    there.close()
    device.destroy_stream(prefill)


def test_the_bench_holds_the_engine_against_the_link(device: Device) -> None:
    lines = list(gpu_copies(device, BLOCK_BYTES, 1, Settings(always("staged"), 2, 8 << 20)))
    assert [line.detail["limit_is"] for line in lines] == ["pinned copy"] * 2
    assert all(line.limit is not None and len(line.detail["ratios"]) == 1 for line in lines)


@pytest.mark.gpu
def test_torch_s_streams_order_parks_and_restores() -> None:
    """A kernel that takes long, on a stream of torch's: the park has what it wrote, and nobody waited.

    Then a restore into a page that a kernel of the current stream still overwrites, and a layer's event.
    """
    import torch

    slots = Slots(1 << 20)
    tensors = [torch.zeros(32, 16, 2, 64, dtype=torch.float16, device="cuda") for _ in range(4)]
    layout = paged(
        list(zip(tensors[::2], tensors[1::2], strict=True)), "page token head dim", block_tokens=64
    )
    pool = Pool(layout, tensors)
    place = place_of(location_of(pool))
    assert isinstance(place, CudaPlace) and place.engine == "cuda" and place.device and place.device_bytes
    engine = CudaCopyEngine(place.gpu, slots, [slots.bytes], settings=Settings(always("staged"), 2, 1 << 18))
    nbytes = layout.geometry.groups[0].object_bytes(64)
    item = CopyItem(0, 0, 64, 0, 0, 1, (0, 0), nbytes)
    big, stream = torch.randn(8192, 8192, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()

    def busy() -> None:
        for _ in range(20):
            torch.mm(big, big)

    answers: list[CopyResult] = []
    events = []
    with torch.cuda.stream(stream):
        busy()
        for number, tensor in enumerate(tensors):
            tensor[:4] = number + 1
            if number % 2:
                events.append(torch.cuda.Event())
                events[-1].record()
        current = place.mark()
    for order in ({"after": place.mark(stream)}, {"after": current}):
        engine.submit(CopyBatch("p", 0, "gather", pool.bind(range(4)), (item,), **order), answers.append)
    by_layer = tuple(place.event(event) for event in events)
    engine.submit(
        CopyBatch("p", 1, "gather", pool.bind(range(4)), (item,), after_layers=by_layer), answers.append
    )
    assert engine.wait_idle(60) and all(answer.ok for answer in answers)
    stored = slots.view((0, 0), nbytes).view(np.float16).reshape(4, -1)
    assert [set(row.tolist()) for row in stored] == [{1.0}, {2.0}, {3.0}, {4.0}]
    busy()
    tensors[0][8:12] = -1
    told: dict[int, StreamEvent] = {}
    back = (replace(item, checksum=answers[0].checksums[0]),)
    engine.submit(
        CopyBatch(
            "r", 0, "scatter", pool.bind(range(8, 12)), back, after=place.mark(), on_layer=told.__setitem__
        ),
        answers.append,
    )
    assert engine.wait_idle(60) and answers[-1].ok
    told[0].wait(place.stream(None))
    assert torch.equal(tensors[0][8:12], tensors[0][:4])
    engine.close()


@pytest.mark.gpu
def test_a_graph_is_captured_while_the_engine_copies() -> None:
    """In torch's strictest mode of capturing, other threads' calls that allocate or wait end the capture."""
    import torch

    device = CudaDevice(0)
    rates = WayRates(device, 1 << 24, objects=4)
    binding, items = bind_scratch(rates._pool, 1 << 15, 1 << 22, 4)
    over, copied, failed = threading.Event(), threading.Event(), []

    def copy() -> None:
        while not over.is_set():
            try:
                copy_once(rates.engine, "gather", binding, items, True)
            except TierUnavailable as error:
                failed.append(error)
            copied.set()

    thread = threading.Thread(target=copy)
    thread.start()
    a, out = torch.ones(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")
    torch.mm(a, a)
    assert copied.wait(60)
    try:
        for _ in range(20):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(50):
                    torch.mm(a, a, out=out)
            graph.replay()
    finally:
        over.set()
        thread.join()
    torch.cuda.synchronize()
    assert not failed and bool((out == 64).all())
    rates.close()


def test_a_thread_that_never_used_the_device_may_ask(device: Device) -> None:
    """Calls of the driver want a context, which no call of the runtime has bound for it."""
    address, found = device.allocate(1 << 21), []
    thread = threading.Thread(target=lambda: found.append(device.extent(address + 7)))
    thread.start()
    thread.join()
    assert found[0][0] == address and found[0][1] >= 1 << 21
    device.free(address)


def test_memory_that_is_not_the_device_s_has_no_handle(device: Device) -> None:
    with pytest.raises((GeometryError, TierUnavailable)):
        device.export_memory(int(np.zeros(64, np.uint8).ctypes.data))


def test_the_engine_says_how_much_memory_it_takes(device: Device) -> None:
    slots = Slots(1 << 16)
    engine = CudaCopyEngine(device, slots, [slots.bytes], settings=Settings(always("staged"), 2, 8192))
    assert engine.device_bytes == 2 * 2 * 8192
    engine.close()
    free, whole = device.memory_info()
    assert 0 < free <= whole
