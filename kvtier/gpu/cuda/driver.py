"""The few calls of CUDA's driver that cupy does not have, by ctypes on libcuda. Not run on a GPU yet.

cuMemcpyBatchAsync (cuda.h of CUDA 13, `_v2`; CUDA 12.8 has an older one with one more argument): libcuda
exports both under fixed names, so the driver that is there decides, not the toolkit that cupy was built with.
cuDevicePrimaryCtxRetain: the context that the runtime, torch and cupy share.
cuFuncLoad: loads a kernel before its first launch.  cuThreadExchangeStreamCaptureMode: see relax_capture.
cuMemGetAddressRange: base and size of the allocation that an address lies in.
NVML's nvmlDeviceGetMemoryInfo: the only question about a device's memory that needs, and makes, no context.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from kvtier.errors import TierUnavailable
from kvtier.gpu.cuda.device import Words

LIBRARY = "libcuda.so.1"
NVML = "libnvidia-ml.so.1"
SUCCESS = 0
# The source is read in the order of the stream. 'Any' would let the copy engines read pages before the event
# that the stream waits for.
ORDER_STREAM = 1
PREFER_OVERLAP_WITH_COMPUTE = 1
MAX_BATCH = 4096
CAPTURE_RELAXED = 2


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def used_bytes(identity: str) -> int | None:
    """Memory in use of the device at this PCI address, by all processes; None where NVML does not say."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return None
    device, memory = ctypes.c_void_p(), _NvmlMemory()
    if nvml.nvmlInit_v2() != SUCCESS:
        return None
    try:
        name = ctypes.c_char_p(identity.encode())
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(name, ctypes.byref(device)) != SUCCESS:
            return None
        said = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == SUCCESS
        return int(memory.used) if said else None
    finally:
        nvml.nvmlShutdown()


@cache
def library() -> ctypes.CDLL:
    """libcuda. Raises TierUnavailable where there is no driver."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise TierUnavailable(
            f"there is no CUDA driver here: {error}", fix="install the NVIDIA driver, or pass --gpus"
        ) from error


def version() -> int:
    """The CUDA version that the driver is for, as 13000 for 13.0. Raises TierUnavailable."""
    number = ctypes.c_int(0)
    check(library().cuDriverGetVersion(ctypes.byref(number)), "cuDriverGetVersion")
    return number.value


def primary_context(number: int) -> int:
    """Handle of the device's context that everyone shares, made now where there is none.

    It is held until the process ends.  Raises TierUnavailable.
    """
    driver, device, context = library(), ctypes.c_int(0), ctypes.c_void_p()
    check(driver.cuInit(ctypes.c_uint(0)), "cuInit")
    check(driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(number)), "cuDeviceGet")
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return int(context.value or 0)


def load(function: int) -> None:
    """Load a kernel of the thread's context now, where the driver can (CUDA 12.4). Raises TierUnavailable."""
    if hasattr(library(), "cuFuncLoad"):
        check(library().cuFuncLoad(ctypes.c_void_p(function)), "cuFuncLoad")


def relax_capture() -> None:
    """Let this thread allocate and wait while another one captures a graph. Raises TierUnavailable.

    In CUDA's strictest mode of capturing, which is torch's default, such a call of any other thread fails,
    and ends the capture.
    """
    _exchange_capture(CAPTURE_RELAXED)


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """relax_capture for as long as this lasts: the thread's own mode is another's affair."""
    before = _exchange_capture(CAPTURE_RELAXED)
    try:
        yield
    finally:
        _exchange_capture(before)


def _exchange_capture(wanted: int) -> int:
    """Set the thread's mode; what it was."""
    mode = ctypes.c_int(wanted)
    check(
        library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode"
    )
    return mode.value


def can_batch() -> bool:
    """Whether the driver has batched copies (CUDA 12.8 and later)."""
    return any(hasattr(library(), name) for name in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync"))


def copy_batch(targets: Words, sources: Words, sizes: Words, stream: int) -> None:
    """Queue these copies, uint64 [n] each, in calls of at most MAX_BATCH. Raises TierUnavailable."""
    for first in range(0, len(sizes), MAX_BATCH):
        part = slice(first, first + MAX_BATCH)
        _copy_some(targets[part].copy(), sources[part].copy(), sizes[part].copy(), stream)


def _copy_some(targets: Words, sources: Words, sizes: Words, stream: int) -> None:
    driver = library()
    attributes = _Attributes(ORDER_STREAM, flags=PREFER_OVERLAP_WITH_COMPUTE)
    index, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
    arrays = [ctypes.c_void_p(int(column.ctypes.data)) for column in (targets, sources, sizes)]
    count = ctypes.c_size_t(len(sizes))
    shared = [*arrays, count, ctypes.byref(attributes), ctypes.byref(index), ctypes.c_size_t(1)]
    if hasattr(driver, "cuMemcpyBatchAsync_v2"):
        code = driver.cuMemcpyBatchAsync_v2(*shared, ctypes.c_void_p(stream))
    else:
        code = driver.cuMemcpyBatchAsync(*shared, ctypes.byref(failed), ctypes.c_void_p(stream))
    check(code, "cuMemcpyBatchAsync")


def address_range(address: int) -> tuple[int, int]:
    """(base, bytes) of the allocation with this address. Raises TierUnavailable."""
    base, size = ctypes.c_uint64(0), ctypes.c_size_t(0)
    code = library().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    check(code, "cuMemGetAddressRange")
    return base.value, size.value


def check(code: int, call: str) -> None:
    """Raise TierUnavailable with the driver's text unless the call succeeded."""
    if code == SUCCESS:
        return
    text = ctypes.c_char_p()
    known = library().cuGetErrorString(code, ctypes.byref(text)) == SUCCESS
    said: Any = text.value if known else None
    raise TierUnavailable(f"{call}: {said.decode() if said else f'error {code}'}")
