"""A GPU by way of cupy: its runtime bindings for streams, events and copies, NVRTC for the kernels.

Not run on a GPU yet.

The kernels are compiled on the machine by NVRTC (cupy.RawModule), which torch's and cupy's wheels bring, for
the GPU that is there; cupy keeps the result in ~/.cupy/kernel_cache.  Shipping cubins would tie the package
to a list of architectures.  cupy arrays are not used at all: no allocator of cupy's, no elementwise kernels.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda import driver
from kvtier.gpu.cuda.device import CODED, Event, Kernel, Stream, Words
from kvtier.gpu.tensors import Bytes

KERNELS = Path(__file__).with_name("kernels")
THREADS = 256
TILES_PER_BLOCK = THREADS // 32
# Blocks of a gather or scatter: what keeps a link busy several times over, on an eighth of a large GPU.
COPY_BLOCKS = 16
CHECKSUM_BLOCKS = 32
# Codecs compute between their loads, and so need more threads to keep a link busy.
CODEC_BLOCKS = 64
NOT_READY = 600
HOST_REGISTER_PORTABLE, HOST_REGISTER_MAPPED = 1, 2

P = ParamSpec("P")
R = TypeVar("R")


def _device_errors(call: Callable[P, R]) -> Callable[P, R]:
    """cupy's errors of the runtime and driver as TierUnavailable."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except RuntimeError as error:
            raise TierUnavailable(str(error)) from error

    return wrapped


def _on_device(
    call: Callable[Concatenate[CudaDevice, P], R],
) -> Callable[Concatenate[CudaDevice, P], R]:
    """The call with the device's context as the thread's, and then again what was: it may be the engine's.

    Not by cudaSetDevice: since CUDA 12 that makes a context on the device that it goes back to, and one that
    is the thread's already it need not bind, which calls of the driver want.
    """

    @functools.wraps(call)
    def wrapped(device: CudaDevice, /, *args: P.args, **kwargs: P.kwargs) -> R:
        driver_of = device._driver
        before = driver_of.ctxGetCurrent()
        if before == device._context:
            return call(device, *args, **kwargs)
        driver_of.ctxSetCurrent(device._context)
        try:
            return call(device, *args, **kwargs)
        finally:
            driver_of.ctxSetCurrent(before)

    return _device_errors(wrapped)


def _beside_captures(
    call: Callable[Concatenate[CudaDevice, P], R],
) -> Callable[Concatenate[CudaDevice, P], R]:
    """Of calls that CUDA forbids a thread while another one captures a graph: see driver.relax_capture.

    Any thread may make them, also one that `enter` is not for: its mode is then what it was.
    """

    @functools.wraps(call)
    def wrapped(device: CudaDevice, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with driver.relaxed_capture():
            return call(device, *args, **kwargs)

    return _on_device(wrapped)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise TierUnavailable(
            f"cupy cannot be imported: {error}", fix="pip install 'kvtier[cuda13]' or 'kvtier[cuda12]'"
        ) from error
    return cupy


@_device_errors
def identities() -> list[str]:
    """Of the visible devices, in CUDA's order; makes no context. Raises TierUnavailable."""
    run = _cupy().cuda.runtime
    return [str(run.deviceGetPCIBusId(number)) for number in range(int(run.getDeviceCount()))]


class CudaDevice:
    """See kvtier.gpu.cuda.device.Device. number: as CUDA counts visible devices.

    Raises TierUnavailable when there is no such device, or cupy is missing, with the fix.
    """

    @_device_errors
    def __init__(self, number: int = 0) -> None:
        self._cupy: Any = _cupy()
        self._run: Any = self._cupy.cuda.runtime
        self._driver: Any = self._cupy.cuda.driver
        self.number = number
        count = int(self._run.getDeviceCount())
        if number >= count:
            raise TierUnavailable(f"there is no CUDA device {number}; {count} are visible")
        self.name = str(self._run.getDeviceProperties(number)["name"].decode())
        self.identity = str(self._run.deviceGetPCIBusId(number))
        self.location = f"cuda:{number}"
        self.can_batch = driver.can_batch()
        before = driver.used_bytes(self.identity)
        self._context = driver.primary_context(number)
        self._functions: dict[Kernel, int] = self._compile()
        self._warm()
        after = driver.used_bytes(self.identity)
        # Others allocate meanwhile, so it is an estimate.
        self.context_bytes = 0 if before is None or after is None else max(0, after - before)

    @_beside_captures
    def _compile(self) -> dict[Kernel, int]:
        options = ("-std=c++17", f"-I{KERNELS}")
        self._module = self._cupy.RawModule(code=(KERNELS / "kv_copy.cu").read_text(), options=options)
        names: tuple[Kernel, ...] = ("gather", "scatter", "checksum", *CODED)
        try:
            self._kernels = [self._module.get_function(f"kv_{name}") for name in names]
        except self._cupy.cuda.compiler.CompileException as error:
            raise TierUnavailable(f"the kernels do not compile here: {error}") from error
        return {name: int(kernel.kernel.ptr) for name, kernel in zip(names, self._kernels, strict=True)}

    @_beside_captures
    def _warm(self) -> None:
        """Load the kernels, and launch the one with the largest frame over nothing.

        Else their first launches would do that, and wait for all that runs on the device, whatever its
        streams wait for.
        """
        for function in self._functions.values():
            driver.load(function)
        stream, event = self.stream(), self.event()
        self.launch("checksum", 0, 0, 0, 0, stream)
        self.record(event, stream)
        self.synchronize(event)
        self.destroy_event(event)
        self.destroy_stream(stream)

    @_device_errors
    def enter(self) -> None:
        """See Device."""
        self._driver.ctxSetCurrent(self._context)
        driver.relax_capture()

    # -- streams and events

    @_on_device
    def current_stream(self) -> Stream:
        """See Device. torch is asked only where the process has loaded it and it runs on GPUs."""
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return int(torch.cuda.current_stream(self.number).cuda_stream)
        return int(self._cupy.cuda.get_current_stream().ptr)

    @_on_device
    def capturing(self, stream: Stream) -> bool:
        """See Device."""
        return bool(self._run.streamIsCapturing(stream))

    @_beside_captures
    def stream(self) -> Stream:
        """See Device. Streams have priority 0 unless asked otherwise, and that is CUDA's lowest."""
        return int(self._run.streamCreateWithFlags(self._run.streamNonBlocking))

    @_beside_captures
    def destroy_stream(self, stream: Stream) -> None:
        """See Device."""
        self._run.streamDestroy(stream)

    @_beside_captures
    def event(self, *, timed: bool = False, shared: bool = False) -> Event:
        """See Device."""
        flags = self._run.eventBlockingSync
        if not timed:
            flags |= self._run.eventDisableTiming
        if shared:
            flags |= self._run.eventInterprocess
        return int(self._run.eventCreateWithFlags(flags))

    @_beside_captures
    def destroy_event(self, event: Event) -> None:
        """See Device."""
        self._run.eventDestroy(event)

    @_on_device
    def record(self, event: Event, stream: Stream) -> None:
        """See Device."""
        # The default stream's handle names the one of the thread's context.
        self._run.eventRecord(event, stream)

    @_on_device
    def wait(self, stream: Stream, event: Event) -> None:
        """See Device."""
        self._run.streamWaitEvent(stream, event)

    @_beside_captures
    def done(self, event: Event) -> bool:
        """See Device. cupy answers CUDA's code here, and does not raise."""
        code = int(self._run.eventQuery(event))
        if code not in (0, NOT_READY):
            raise TierUnavailable(f"cudaEventQuery: error {code}")
        return code == 0

    @_beside_captures
    def synchronize(self, event: Event) -> None:
        """See Device."""
        self._run.eventSynchronize(event)

    @_beside_captures
    def elapsed_s(self, begin: Event, end: Event) -> float:
        """See Device."""
        return float(self._run.eventElapsedTime(begin, end)) / 1e3

    # -- memory

    @_beside_captures
    def allocate(self, nbytes: int) -> int:
        """See Device."""
        return int(self._run.malloc(nbytes))

    @_beside_captures
    def free(self, address: int) -> None:
        """See Device."""
        self._run.free(address)

    @_beside_captures
    def pinned(self, nbytes: int) -> Bytes:
        """See Device."""
        address = int(self._run.hostAlloc(nbytes, self._run.hostAllocPortable))
        memory: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        return memory

    @_beside_captures
    def free_pinned(self, memory: Bytes) -> None:
        """See Device."""
        self._run.freeHost(int(memory.ctypes.data))

    @_beside_captures
    def register(self, memory: Bytes) -> None:
        """See Device."""
        flags = HOST_REGISTER_PORTABLE | HOST_REGISTER_MAPPED
        self._run.hostRegister(int(memory.ctypes.data), memory.nbytes, flags)

    @_beside_captures
    def unregister(self, memory: Bytes) -> None:
        """See Device."""
        self._run.hostUnregister(int(memory.ctypes.data))

    @_on_device
    def device_address(self, host_address: int) -> int:
        """See Device."""
        return int(self._run.pointerGetAttributes(host_address).devicePointer)

    @_beside_captures
    def memory_info(self) -> tuple[int, int]:
        """See Device."""
        free, whole = self._run.memGetInfo()
        return int(free), int(whole)

    # -- work

    @_on_device
    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See Device."""
        self._run.memcpyAsync(target, source, nbytes, self._run.memcpyDefault, stream)

    @_on_device
    def copy_batch(self, targets: Words, sources: Words, sizes: Words, stream: Stream) -> None:
        """See Device."""
        if self.can_batch:
            driver.copy_batch(targets, sources, sizes, stream)
            return
        for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            self._run.memcpyAsync(target, source, nbytes, self._run.memcpyDefault, stream)

    @_on_device
    def launch(
        self,
        kernel: Kernel,
        segments: int,
        count: int,
        tiles: int,
        base: int,
        stream: Stream,
        more: tuple[int, int] = (0, 0),
    ) -> None:
        """See Device."""
        hashes = kernel in ("checksum", "hash")
        most = CHECKSUM_BLOCKS if hashes else CODEC_BLOCKS if kernel in CODED else COPY_BLOCKS
        blocks = max(1, min(tiles if hashes else -(-tiles // TILES_PER_BLOCK), most))
        values: list[Any] = [
            ctypes.c_uint64(segments),
            ctypes.c_uint32(count),
            ctypes.c_uint32(tiles),
            ctypes.c_uint64(base),
        ]
        if kernel in CODED:
            values += [ctypes.c_uint64(word) for word in more]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        launch = self._cupy.cuda.driver.launchKernel
        launch(self._functions[kernel], blocks, 1, 1, THREADS, 1, 1, 0, stream, ctypes.addressof(pointers), 0)

    # -- other processes

    @_beside_captures
    def extent(self, address: int) -> tuple[int, int]:
        """See Device."""
        return driver.address_range(address)

    @_beside_captures
    def export_memory(self, address: int) -> tuple[bytes, int]:
        """See Device."""
        base, _ = self.extent(address)
        try:
            return bytes(self._run.ipcGetMemHandle(base)), address - base
        except RuntimeError as error:
            raise GeometryError(
                f"the pool's memory cannot be mapped by another process: {error}",
                fix="unset expandable_segments in PYTORCH_ALLOC_CONF, and use no cumem or sleep-mode "
                "allocator; or use mode 'worker'",
            ) from error

    @_beside_captures
    def open_memory(self, handle: bytes) -> int:
        """See Device."""
        return int(self._run.ipcOpenMemHandle(handle))

    @_beside_captures
    def close_memory(self, address: int) -> None:
        """See Device."""
        self._run.ipcCloseMemHandle(address)

    @_beside_captures
    def export_event(self, event: Event) -> bytes:
        """See Device."""
        return bytes(self._run.ipcGetEventHandle(event))

    @_beside_captures
    def open_event(self, handle: bytes) -> Event:
        """See Device."""
        return int(self._run.ipcOpenEventHandle(handle))
