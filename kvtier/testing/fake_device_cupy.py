"""A cupy and a libcuda that run everything at once on the CPU, for the tests of CudaDevice.

The functions take what cupy 14's take, in number and kind.  Kernels are the real ones' arithmetic, compiled
as host code.  What it cannot show is anything about time, order or a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

SUCCESS, NOT_READY, NOT_FOUND, NO_CONTEXT = 0, 600, 500, 201
NOT_WHILE_CAPTURING, CAPTURE_GLOBAL, CAPTURE_RELAXED = 900, 0, 2
# What CUDA lets every thread call while another one captures a graph.
BESIDE_CAPTURES = ("streamWaitEvent", "streamIsCapturing", "eventRecord", "memcpyAsync")
# The primary context of device n is this and n.
CONTEXT = 1000
TILE_BYTES = 4096


class CUDARuntimeError(RuntimeError):
    """As cupy's."""


class CompileException(Exception):
    """As cupy's."""


class StubRuntime:
    """cupy.cuda.runtime. calls: names in order; fail: the name of a function that raises.

    context: the calling thread's own, 0 for none.  made: devices that have one, in order.  mode: the
    calling thread's, of how captures of graphs concern it.  captured: whether another thread captures one, in
    the strictest mode, and so ends by what a thread calls that it concerns.
    """

    streamNonBlocking, eventBlockingSync, eventDisableTiming, eventInterprocess = 1, 1, 2, 4
    hostAllocPortable, memcpyDefault = 1, 4

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail = ""
        self.ready = SUCCESS
        self.kept: dict[int, Any] = {}
        self.registered: dict[int, tuple[int, int]] = {}
        self.events: dict[int, int] = {}
        self.made: list[int] = []
        self.captured = False
        self._threads = threading.local()
        self.count = 1
        self._number = 100

    @property
    def context(self) -> int:
        return getattr(self._threads, "context", 0)

    @context.setter
    def context(self, context: int) -> None:
        self._threads.context = context

    @property
    def mode(self) -> int:
        return getattr(self._threads, "mode", CAPTURE_GLOBAL)

    @mode.setter
    def mode(self, mode: int) -> None:
        self._threads.mode = mode

    def _called(self, name: str, *whole: int) -> None:
        self.calls.append(name)
        # Without one the runtime would make one on the thread's device, whichever that is.
        assert self.context - CONTEXT in self.made, (name, self.context)
        assert all(type(value) is int for value in whole), (name, whole)
        if self.fail == name:
            raise CUDARuntimeError(f"{name}: cudaErrorUnknown")
        if name not in BESIDE_CAPTURES and self.ends_a_capture():
            raise CUDARuntimeError(f"{name}: operation not permitted when stream is capturing")

    def ends_a_capture(self) -> bool:
        return self.captured and self.mode != CAPTURE_RELAXED

    def _new(self) -> int:
        self._number += 1
        return self._number

    def getDeviceCount(self) -> int:
        return self.count

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        return {"name": b"Stub"}

    def deviceGetPCIBusId(self, device: int) -> str:
        return f"0000:0{device + 1}:00.0"

    def streamCreateWithFlags(self, flags: int) -> int:
        self._called("streamCreateWithFlags", flags)
        return self._new()

    def streamDestroy(self, stream: int) -> None:
        self._called("streamDestroy", stream)

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0) -> None:
        self._called("streamWaitEvent", stream, event, flags)
        assert event in self.events

    def streamIsCapturing(self, stream: int) -> bool:
        self._called("streamIsCapturing", stream)
        return False

    def eventCreateWithFlags(self, flags: int) -> int:
        self._called("eventCreateWithFlags", flags)
        event = self._new()
        self.events[event] = flags
        return event

    def eventDestroy(self, event: int) -> None:
        self._called("eventDestroy", event)
        del self.events[event]

    def eventRecord(self, event: int, stream: int) -> None:
        self._called("eventRecord", event, stream)

    def eventSynchronize(self, event: int) -> None:
        self._called("eventSynchronize", event)

    def eventQuery(self, event: int) -> int:
        self._called("eventQuery", event)
        return self.ready

    def eventElapsedTime(self, begin: int, end: int) -> float:
        return 1500.0

    def malloc(self, nbytes: int) -> int:
        self._called("malloc", nbytes)
        made = np.full(nbytes + 256, 0xA5, np.uint8)
        address = int(made.ctypes.data) + -int(made.ctypes.data) % 256
        self.kept[address] = made
        return address

    def free(self, address: int) -> None:
        self._called("free", address)
        del self.kept[address]

    def hostAlloc(self, nbytes: int, flags: int) -> int:
        return self.malloc(nbytes)

    def freeHost(self, address: int) -> None:
        self.free(address)

    def hostRegister(self, address: int, nbytes: int, flags: int) -> None:
        self._called("hostRegister", address, nbytes, flags)
        self.registered[address] = (nbytes, flags)

    def hostUnregister(self, address: int) -> None:
        self._called("hostUnregister", address)
        del self.registered[address]

    def pointerGetAttributes(self, address: int) -> Any:
        return SimpleNamespace(devicePointer=address)

    def memGetInfo(self) -> tuple[int, int]:
        return 1 << 30, 1 << 31

    def memcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        self._called("memcpyAsync", target, source, nbytes, kind, stream)
        ctypes.memmove(target, source, nbytes)

    def ipcGetMemHandle(self, address: int) -> bytes:
        self._called("ipcGetMemHandle", address)
        return address.to_bytes(8, "little") * 8

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:
        self._called("ipcOpenMemHandle", flags)
        return int.from_bytes(handle[:8], "little")

    def ipcCloseMemHandle(self, address: int) -> None:
        self._called("ipcCloseMemHandle", address)

    def ipcGetEventHandle(self, event: int) -> bytes:
        self._called("ipcGetEventHandle", event)
        assert self.events[event] & self.eventInterprocess and self.events[event] & self.eventDisableTiming
        return event.to_bytes(8, "little") * 8

    def ipcOpenEventHandle(self, handle: bytes) -> int:
        self._called("ipcOpenEventHandle")
        event = self._new()
        self.events[event] = 0
        return event


class StubCupy:
    """What CudaDevice uses of cupy. host: the kernels as host code."""

    def __init__(self, host: ctypes.CDLL) -> None:
        self.runtime = StubRuntime()
        self._host = host
        self.launches: list[tuple[str, int]] = []
        self._names: list[str] = []
        self.cuda = SimpleNamespace(
            runtime=self.runtime,
            compiler=SimpleNamespace(CompileException=CompileException),
            driver=SimpleNamespace(
                launchKernel=self._launch,
                ctxGetCurrent=lambda: self.runtime.context,
                ctxSetCurrent=self._set_context,
            ),
            get_current_stream=lambda: SimpleNamespace(ptr=7),
        )

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> Any:
        def get_function(name: str) -> Any:
            if f"\n{name}(" not in code:
                raise CompileException(name)
            self._names.append(name)
            return SimpleNamespace(kernel=SimpleNamespace(ptr=len(self._names)))

        assert any(option.startswith("-I") for option in options)
        return SimpleNamespace(get_function=get_function)

    def _set_context(self, context: int) -> None:
        self.runtime.context = context

    def _launch(self, function: int, *shape_and_more: int) -> None:
        assert self.runtime.context - CONTEXT in self.runtime.made
        gx, gy, gz, bx, by, bz, shared, _stream, params, extra = shape_and_more
        assert (gy, gz, by, bz, shared, extra) == (1, 1, 1, 1, 0, 0) and gx >= 1 and bx == 256
        values = (ctypes.c_void_p * 4).from_address(params)
        segments = ctypes.c_uint64.from_address(values[0] or 0).value
        count = ctypes.c_uint32.from_address(values[1] or 0).value
        base = ctypes.c_uint64.from_address(values[3] or 0).value
        name = self._names[function - 1]
        self.launches.append((name, gx))
        if name == "kv_checksum":
            self._host.kv_host_checksum(ctypes.c_void_p(segments), count, ctypes.c_void_p(base))
        else:
            gather = int(name == "kv_gather")
            self._host.kv_host_move(
                ctypes.c_void_p(segments), count, ctypes.c_uint64(base), gather, TILE_BYTES
            )


class StubDriver:
    """What driver.py uses of libcuda. old: with CUDA 12.8's form of batched copies, one argument more."""

    def __init__(self, runtime: StubRuntime, *, batches: str = "new") -> None:
        self._runtime = runtime
        self.copies = 0
        self.loaded: list[int] = []
        self.code = SUCCESS
        if batches == "new":
            self.cuMemcpyBatchAsync_v2 = self._copy_batch
        if batches == "old":
            self.cuMemcpyBatchAsync = self._copy_batch_old

    def _copy_batch_old(self, *given: Any) -> int:
        *first, failed, stream = given
        assert isinstance(failed._obj, ctypes.c_size_t)
        return self._copy_batch(*first, stream)

    def _copy_batch(self, *given: Any) -> int:
        targets, sources, sizes, count, attributes, index, attribute_count, stream = given
        assert attributes._obj.source_order == 1 and index._obj.value == 0 and attribute_count.value == 1
        assert stream.value
        rows = [
            np.ctypeslib.as_array((ctypes.c_uint64 * count.value).from_address(column.value)).tolist()
            for column in (targets, sources, sizes)
        ]
        for target, source, nbytes in zip(*rows, strict=True):
            ctypes.memmove(target, source, nbytes)
        self.copies += count.value
        return self.code

    def cuInit(self, flags: Any) -> int:
        return SUCCESS

    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:
        device._obj.value = ordinal.value
        return SUCCESS

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self._runtime.made.append(device.value)
        context._obj.value = CONTEXT + device.value
        return SUCCESS

    def cuFuncLoad(self, function: Any) -> int:
        self.loaded.append(function.value)
        return SUCCESS

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        wanted, mode._obj.value = mode._obj.value, self._runtime.mode
        self._runtime.mode = wanted
        return SUCCESS

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> int:
        if not self._runtime.context:
            return NO_CONTEXT
        if self._runtime.ends_a_capture():
            return NOT_WHILE_CAPTURING
        for begin, memory in self._runtime.kept.items():
            if begin <= address.value < begin + memory.nbytes - 256:
                base._obj.value, size._obj.value = begin, memory.nbytes - 256
                return SUCCESS
        return NOT_FOUND

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13000
        return self.code

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"named symbol not found"
        return SUCCESS if code == NOT_FOUND else 1
