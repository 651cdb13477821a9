"""CudaDevice against a cupy and a libcuda that run at once on the CPU: its calls, and with what."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.checksum import checksum
from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda import driver
from kvtier.gpu.cuda.cupy_device import COPY_BLOCKS, CudaDevice, identities
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.ipc import EventRing, MappedPool, PeerEvents, Prober, export_pool
from kvtier.gpu.cuda.ipc_pool import IpcPool
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import CudaPlace, device_of
from kvtier.gpu.cuda.measure import copy_once, fit
from kvtier.gpu.cuda.memory import PinnedArena
from kvtier.gpu.cuda.ways import WAYS, Way, always
from kvtier.gpu.engine import CopyItem
from kvtier.testing.fake_device_cupy import (
    CAPTURE_GLOBAL,
    CAPTURE_RELAXED,
    CONTEXT,
    NOT_READY,
    StubCupy,
    StubDriver,
)
from kvtier.testing.fake_device_host import compiled
from kvtier.testing.fake_device_pools import Uploaded
from kvtier.testing.pool_cases import BUILDERS, Case, Slots


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled("host_check.cpp", tmp_path_factory.mktemp("stub"))


@pytest.fixture
def cupy(host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> StubCupy:
    made = StubCupy(host)
    monkeypatch.setitem(sys.modules, "cupy", made)
    return made


@pytest.fixture
def libcuda(cupy: StubCupy, monkeypatch: pytest.MonkeyPatch) -> StubDriver:
    made = StubDriver(cupy.runtime)
    monkeypatch.setattr(driver, "library", lambda: made)
    return made


@pytest.fixture
def cuda(cupy: StubCupy, libcuda: StubDriver) -> CudaDevice:
    return CudaDevice(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", BUILDERS)
def test_the_whole_engine_on_it(
    cuda: CudaDevice, cupy: StubCupy, libcuda: StubDriver, build: Callable[..., Case], way: Way
) -> None:
    """Real descriptors, the kernels' own arithmetic, and what cupy is given for them."""
    case = build("uint16", 4, 2, 8)
    case.fill(1)
    there, slots = Uploaded(cuda, case), Slots(1 << 18)
    engine = CudaCopyEngine(cuda, slots, [slots.bytes], settings=Settings(always(way), 2, 8192, 1 << 16))
    nbytes = case.layout.geometry.groups[0].object_bytes(16, 3)
    item = CopyItem(0, 16, 16, 3, 0, 1, (0, 0), nbytes)
    wanted = case.expected(0, list(range(8)), 16, 16, 3)
    _, result = copy_once(engine, "gather", there.pool.bind(range(8)), [item], True)
    assert result.checksums == (checksum(wanted),)
    assert slots.view((0, 0), nbytes).tobytes() == wanted
    back = CopyItem(0, 16, 16, 3, 0, 1, (0, 0), nbytes, checksum(wanted))
    copy_once(engine, "scatter", there.pool.bind(range(20, 28)), [back], True)
    there.download()
    assert case.expected(0, list(range(20, 28)), 16, 16, 3) == wanted
    engine.close()
    there.close()
    assert not cupy.runtime.kept and not cupy.runtime.registered and not cupy.runtime.events
    kernels = {name for name, _ in cupy.launches}
    assert kernels == ({"kv_checksum"} if way == "batch" else {"kv_checksum", "kv_gather", "kv_scatter"})
    assert (libcuda.copies > 0) == (way == "batch")
    assert all(blocks <= max(COPY_BLOCKS, 32) for _, blocks in cupy.launches)


@pytest.mark.parametrize("batches", ["old", "none"])
def test_older_drivers(cupy: StubCupy, monkeypatch: pytest.MonkeyPatch, batches: str) -> None:
    """CUDA 12.8's form of the call, and drivers without it, where copies go one by one."""
    made = StubDriver(cupy.runtime, batches=batches)
    monkeypatch.setattr(driver, "library", lambda: made)
    device = CudaDevice(0)
    assert device.can_batch == (batches == "old")
    source = np.arange(10000, dtype=np.uint64)
    target = np.zeros_like(source)
    at = np.arange(10000, dtype=np.uint64) * np.uint64(8)
    sizes = np.full(10000, 8, np.uint64)
    device.copy_batch(at + np.uint64(target.ctypes.data), at + np.uint64(source.ctypes.data), sizes, 7)
    assert (target == source).all()
    assert made.copies == (10000 if batches == "old" else 0)


def test_errors_are_the_tier_s(cuda: CudaDevice, cupy: StubCupy, libcuda: StubDriver) -> None:
    for name, call in {
        "malloc": lambda: cuda.allocate(1),
        "hostRegister": lambda: cuda.register(np.zeros(1, np.uint8)),
        "streamCreateWithFlags": cuda.stream,
        "eventCreateWithFlags": cuda.event,
        "memcpyAsync": lambda: cuda.copy(1, 2, 3, 4),
        "eventSynchronize": lambda: cuda.synchronize(1),
    }.items():
        cupy.runtime.fail = name
        with pytest.raises(TierUnavailable, match="cudaErrorUnknown"):
            call()
    cupy.runtime.fail = ""
    libcuda.code = 2
    with pytest.raises(TierUnavailable, match="cuMemcpyBatchAsync: error 2"):
        cuda.copy_batch(*(np.zeros(1, np.uint64) for _ in range(3)), 1)
    with pytest.raises(TierUnavailable, match="named symbol not found"):
        cuda.extent(1)


def test_events(cuda: CudaDevice, cupy: StubCupy) -> None:
    plain, timed, shared = cuda.event(), cuda.event(timed=True), cuda.event(shared=True)
    assert [cupy.runtime.events[event] for event in (plain, timed, shared)] == [3, 1, 7]
    assert cuda.done(plain)
    cupy.runtime.ready = NOT_READY
    assert not cuda.done(plain)
    cupy.runtime.ready = 700
    with pytest.raises(TierUnavailable, match="700"):
        cuda.done(plain)
    assert cuda.elapsed_s(timed, timed) == 1.5
    assert cuda.open_event(cuda.export_event(shared)) not in (plain, timed, shared)


@pytest.mark.parametrize("context", [0, 77])
def test_the_caller_s_context_stays_current(cuda: CudaDevice, cupy: StubCupy, context: int) -> None:
    """None, or another device's; no other device gets one, which going back by cudaSetDevice would make."""
    cupy.runtime.context = context
    cuda.destroy_stream(cuda.stream())
    memory = cuda.allocate(64)
    assert cuda.extent(memory + 5) == (memory, 64)
    cuda.free(memory)
    cuda.free_pinned(cuda.pinned(64))
    assert cupy.runtime.context == context and cupy.runtime.made == [0]
    cupy.runtime.fail = "malloc"
    with pytest.raises(TierUnavailable):
        cuda.allocate(1)
    assert cupy.runtime.context == context
    assert cupy.runtime.mode == CAPTURE_GLOBAL
    cuda.enter()
    assert cupy.runtime.context == CONTEXT and cupy.runtime.mode == CAPTURE_RELAXED
    cuda.destroy_stream(cuda.stream())
    assert cupy.runtime.mode == CAPTURE_RELAXED
    cupy.runtime.mode, cupy.runtime.context = CAPTURE_GLOBAL, 0


def test_control_a_thread_without_a_context_is_told(cuda: CudaDevice, cupy: StubCupy) -> None:
    cupy.runtime.context = 0
    with pytest.raises(TierUnavailable, match="error 201"):
        driver.address_range(cuda.allocate(64))
    with pytest.raises(AssertionError):
        cupy.runtime.malloc(64)


def test_every_kernel_is_loaded_before_anything_is_copied(
    cuda: CudaDevice, cupy: StubCupy, libcuda: StubDriver
) -> None:
    """A first launch would load it, and wait for streams that may stand still."""
    assert libcuda.loaded == [1, 2, 3, 4, 5, 6]
    assert cupy.launches == [("kv_checksum", 1)]


def test_pools_are_mapped_by_handle_and_offset(cuda: CudaDevice, cupy: StubCupy) -> None:
    case: Case = BUILDERS[9]("uint16", 4, 2, 8)
    there = Uploaded(cuda, case)
    mapped = MappedPool.attach(cuda, export_pool(cuda, there.pool))
    mine, theirs = Prober(cuda, there.pool), Prober(cuda, mapped.pool)
    assert mine.judge(theirs.answer(mine.challenge([1, 2])))
    mapped.close()
    assert cupy.runtime.calls.count("ipcCloseMemHandle") == 1
    cupy.runtime.fail = "ipcGetMemHandle"
    with pytest.raises(GeometryError, match="expandable_segments"):
        export_pool(cuda, there.pool)
    there.close()


def _second_mode(cuda: CudaDevice, there: Uploaded) -> None:
    """All that a worker's threads ask of a device in the second mode, in a thread that was never entered."""
    pool = IpcPool(there.pool, CudaPlace(cuda, Settings(always("staged"), 2, 8192)), [1, 2])
    mapped = MappedPool.attach(cuda, pool.export())
    assert pool.judge(Prober(cuda, mapped.pool).answer(pool.challenge()))
    ring = EventRing(cuda)
    event = pool.listen(ring.handles())(ring.mark(3))
    assert event.done()
    event.synchronize()
    assert PeerEvents(cuda, pool.export()["events"]).event(pool.relay(event)).done()
    del event
    mapped.close()
    ring.close()
    pool.close()
    pool.place.rings.close()
    slots = Slots(1 << 18)
    # Where the service cannot map, the thread that attaches again makes an engine, and closes it.
    pool.place(slots, PinnedArena(cuda, [slots.bytes])).close()


def test_another_thread_s_capture_of_a_graph_goes_on(cuda: CudaDevice, cupy: StubCupy) -> None:
    there = Uploaded(cuda, BUILDERS[0]("uint16", 4, 2, 8))
    cupy.runtime.captured = True
    _second_mode(cuda, there)
    assert cupy.runtime.mode == CAPTURE_GLOBAL and cuda.memory_info()
    cupy.runtime.fail = "malloc"
    with pytest.raises(TierUnavailable, match="cudaErrorUnknown"):
        Prober(cuda, there.pool).challenge([1])
    assert cupy.runtime.mode == CAPTURE_GLOBAL
    cupy.runtime.fail = ""
    there.close()


def test_control_a_thread_that_captures_concern_ends_one(
    cuda: CudaDevice, cupy: StubCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Uploaded(cuda, BUILDERS[0]("uint16", 4, 2, 8))
    cupy.runtime.captured = True
    monkeypatch.setattr(driver, "relaxed_capture", nullcontext)
    with pytest.raises(TierUnavailable, match="not permitted"):
        Prober(cuda, there.pool).challenge([1])


def test_a_device_is_found_by_its_identity_and_no_other_is_touched(
    cupy: StubCupy, libcuda: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context takes hundreds of MiB of a GPU that others use."""
    monkeypatch.setattr(cupy.cuda.runtime, "count", 3)
    assert identities() == [f"0000:0{number}:00.0" for number in (1, 2, 3)]
    found = device_of("0000:02:00.0")
    assert (found.number, found.identity) == (1, "0000:02:00.0")
    assert cupy.runtime.made == [1] and cupy.runtime.context == 0
    with pytest.raises(TierUnavailable, match=r"no CUDA device 0000:09:00\.0 here, but 0000:01:00\.0, "):
        device_of("0000:09:00.0")
    assert cupy.runtime.made == [1]


def test_a_table_is_fitted(cuda: CudaDevice) -> None:
    assert fit(cuda, (256, 4096), 1 << 16).gather[-1][0] == 1 << 62


def test_what_is_missing_is_said(
    cupy: StubCupy, libcuda: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TierUnavailable, match="no CUDA device 1; 1 are visible"):
        CudaDevice(1)
    assert driver.version() == 13000
    monkeypatch.setattr(Path, "read_text", lambda self: "no kernels")
    with pytest.raises(TierUnavailable, match="do not compile"):
        CudaDevice(0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TierUnavailable, match="pip install"):
        CudaDevice(0)


class StubNvml:
    """What driver.py uses of NVML. used: what it answers, one after the other; fail: a call that does."""

    def __init__(self, used: list[int], fail: str = "") -> None:
        self.used, self.open = used, 0
        for name in (
            "nvmlInit_v2",
            "nvmlShutdown",
            "nvmlDeviceGetHandleByPciBusId_v2",
            "nvmlDeviceGetMemoryInfo",
        ):
            setattr(self, name, lambda *given, name=name: int(name == fail) or self._call(name, given))

    def _call(self, name: str, given: tuple[Any, ...]) -> int:
        self.open += {"nvmlInit_v2": 1, "nvmlShutdown": -1}.get(name, 0)
        if name == "nvmlDeviceGetHandleByPciBusId_v2":
            assert given[0].value == b"0000:01:00.0"
        if name == "nvmlDeviceGetMemoryInfo":
            given[1]._obj.used = self.used.pop(0)
        return 0


def test_what_a_context_takes_is_what_nvml_says_more_after_it(
    cupy: StubCupy, libcuda: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = StubNvml([5 << 20, 305 << 20, 9, 5])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    assert CudaDevice(0).context_bytes == 300 << 20
    assert CudaDevice(0).context_bytes == 0
    assert nvml.open == 0


@pytest.mark.parametrize(
    "fail", ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2", "nvmlDeviceGetMemoryInfo"]
)
def test_where_nvml_does_not_answer_nothing_is_said(
    cupy: StubCupy, libcuda: StubDriver, monkeypatch: pytest.MonkeyPatch, fail: str
) -> None:
    nvml = StubNvml([1, 2], fail)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    assert CudaDevice(0).context_bytes == 0 and nvml.open == 0


def test_without_nvml_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "NVML", "libno-such-thing.so")
    assert driver.used_bytes("0000:01:00.0") is None
