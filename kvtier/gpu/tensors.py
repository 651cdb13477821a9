"""Where a tensor lies in memory, for numpy arrays and torch tensors alike. Works without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.errors import GeometryError

Bytes: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, strides in bytes, and bytes of an element. address 0: not known, equal to no other."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    address: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.strides):
            raise GeometryError(f"shape {self.shape} and strides {self.strides} differ in length")
        if any(size < 1 for size in self.shape) or any(stride < 0 for stride in self.strides):
            raise GeometryError(f"a tensor of shape {self.shape}, strides {self.strides} holds no KV")

    @property
    def span_bytes(self) -> int:
        """Bytes from the first element to the end of the last one."""
        return self.itemsize + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """Memory on a GPU, by address. location: 'cuda:0'. owner: what keeps it alive."""

    address: int
    nbytes: int
    location: str
    owner: object


# A numpy array, a torch tensor, an array with __cuda_array_interface__, or a description of one; torch and
# cupy are not imported to say so.
TensorLike: TypeAlias = Any


def is_torch(tensor: TensorLike) -> bool:
    """Whether this is a torch tensor."""
    return type(tensor).__module__.partition(".")[0] == "torch"


def spec_of(tensor: TensorLike) -> TensorSpec:
    """Describe a numpy array or a torch tensor on any device. Raises GeometryError for anything else."""
    if isinstance(tensor, TensorSpec):
        return tensor
    if isinstance(tensor, np.ndarray):
        return TensorSpec(
            tensor.shape, tensor.strides, tensor.itemsize, str(tensor.dtype), int(tensor.ctypes.data)
        )
    if is_torch(tensor):
        size = int(tensor.element_size())
        strides = tuple(int(stride) * size for stride in tensor.stride())
        shape = tuple(int(n) for n in tensor.shape)
        return TensorSpec(shape, strides, size, str(tensor.dtype), int(tensor.data_ptr()))
    if hasattr(tensor, "__cuda_array_interface__"):
        return _spec_of_cuda_array(tensor.__cuda_array_interface__)
    raise GeometryError(
        f"{type(tensor).__name__} is neither a numpy array, nor a torch tensor, nor an array on a GPU",
        fix="hand over what kvtier.gpu.cuda.dlpack.borrowed() makes of anything with __dlpack__",
    )


def _spec_of_cuda_array(interface: dict[str, Any]) -> TensorSpec:
    """See numba's documentation of the CUDA array interface, version 3."""
    dtype = np.dtype(interface["typestr"])
    shape = tuple(int(n) for n in interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        strides = [dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    address, read_only = interface["data"]
    if read_only:
        raise GeometryError("the pool's array is read-only")
    return TensorSpec(shape, tuple(int(s) for s in strides), dtype.itemsize, str(dtype), int(address))


def device_bytes(tensor: TensorLike, nbytes: int) -> DeviceBytes | None:
    """The `nbytes` of GPU memory from the tensor's first element on, without a copy; None on the CPU.

    Raises GeometryError for memory that ends before.
    """
    if isinstance(tensor, DeviceBytes):
        if nbytes > tensor.nbytes:
            raise GeometryError(f"the pool's memory ends after {tensor.nbytes} bytes of {nbytes}")
        return tensor
    if is_torch(tensor):
        if tensor.device.type != "cuda":
            return None
        room = int(tensor.untyped_storage().nbytes())
        room -= int(tensor.storage_offset()) * int(tensor.element_size())
        if nbytes > room:
            raise GeometryError(f"the pool's memory ends after {room} bytes of {nbytes}")
        return DeviceBytes(int(tensor.data_ptr()), nbytes, str(tensor.device), tensor)
    if isinstance(tensor, np.ndarray) or not hasattr(tensor, "__cuda_array_interface__"):
        return None
    spec = spec_of(tensor)
    if nbytes > spec.span_bytes:
        raise GeometryError(f"the pool's memory ends after {spec.span_bytes} bytes of {nbytes}")
    # numba's arrays do not say which device they are on; where there is one, it is that.
    number = int(getattr(getattr(tensor, "device", 0), "id", 0))
    return DeviceBytes(spec.address, nbytes, f"cuda:{number}", tensor)


def stacked(views: Sequence[TensorLike]) -> TensorSpec:
    """One tensor with a new first dimension out of equal views at equal distances in one storage.

    This is how an engine with one storage for all layers hands them out: one view a layer, in order.
    """
    specs = [spec_of(view) for view in views]
    first = specs[0]
    steps = {b.address - a.address for a, b in pairwise(specs)}
    alike = all((s.shape, s.strides, s.dtype) == (first.shape, first.strides, first.dtype) for s in specs)
    if not alike or len(steps) > 1 or any(step <= 0 for step in steps):
        raise GeometryError(
            "the layers' views are not equal views at equal distances in one storage",
            fix="describe the pool with paged(), one tensor a layer",
        )
    step = steps.pop() if steps else first.span_bytes
    return TensorSpec(
        (len(specs), *first.shape), (step, *first.strides), first.itemsize, first.dtype, first.address
    )


def flat_bytes(tensor: TensorLike, nbytes: int) -> Bytes:
    """The `nbytes` of memory from the tensor's first element on, shared, writable.

    Raises GeometryError for memory that the CPU cannot reach, that is read-only, or that ends before.
    """
    if is_torch(tensor):
        return _flat_torch(tensor, nbytes)
    if not isinstance(tensor, np.ndarray):
        raise GeometryError(f"{type(tensor).__name__} has no memory to copy from")
    if not tensor.flags.writeable:
        raise GeometryError("the pool's array is read-only")
    root = tensor
    while isinstance(root.base, np.ndarray):
        root = root.base
    room = int(root.ctypes.data) + spec_of(root).span_bytes - int(tensor.ctypes.data)
    if nbytes > room:
        raise GeometryError(f"the pool's memory ends after {room} bytes of {nbytes}")
    whole = np.lib.stride_tricks.as_strided(
        tensor, (nbytes // tensor.itemsize,), (tensor.itemsize,), subok=False, writeable=True
    )
    return whole.view(np.uint8)


def _flat_torch(tensor: TensorLike, nbytes: int) -> Bytes:
    import torch  # here because everything but torch tensors has to work without it

    if tensor.device.type != "cpu":
        raise GeometryError(
            f"the CPU engine cannot reach memory on {tensor.device}", fix="use the CUDA engine for this pool"
        )
    storage = tensor.untyped_storage()
    begin = int(tensor.storage_offset()) * int(tensor.element_size())
    if begin + nbytes > storage.nbytes():
        raise GeometryError(f"the pool's memory ends after {storage.nbytes() - begin} bytes of {nbytes}")
    raw: Bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return raw[begin : begin + nbytes]
