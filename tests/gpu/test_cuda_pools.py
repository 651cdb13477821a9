"""Pools in GPU memory, described without a GPU: by torch's and the CUDA array interface's look-alikes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvtier.errors import GeometryError
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.cuda.dlpack import borrowed
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.shapes import ShapeCache
from kvtier.gpu.describe import contiguous, cross_layer, paged
from kvtier.gpu.engine import CopyBatch, CopyItem
from kvtier.gpu.pool import Pool, bind_sequence
from kvtier.gpu.tensors import DeviceBytes, device_bytes, spec_of
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.pool_cases import Slots


class CudaArray:
    """An array as cupy and numba show one; its memory is only an address."""

    def __init__(
        self, shape: tuple[int, ...], typestr: str = "<u2", address: int = 1 << 40, strides: Any = None
    ) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "strides": strides,
            "version": 3,
        }


@dataclass
class _Id:
    id: int


def test_separate_k_and_v() -> None:
    k, v = CudaArray((10, 16, 8, 128)), CudaArray((10, 16, 8, 128), address=2 << 40)
    layout = paged([(k, v)], "page token head dim", block_tokens=256)
    pool = Pool(layout, [k, v])
    assert [view.address for view in pool.views[0]] == [1 << 40, 2 << 40]
    assert {view.location for view in pool.views[0]} == {"cuda:0"} and pool.spans == (None,)
    assert layout.token_bytes(0) == 2 * 8 * 128 * 2
    plain = paged([(np.zeros((10, 16, 8, 128), np.uint16),) * 2], "page token head dim", block_tokens=256)
    assert layout.layout_id == plain.layout_id


def test_a_latent_in_fp8_as_bytes() -> None:
    latent = CudaArray((10, 64, 576), "|u1")
    layout = paged([(latent,)], "page token dim", block_tokens=64)
    shape = ShapeCache().shape(Pool(layout, [latent]).bind([3]), 0, 0, 64, 0)
    assert (layout.token_bytes(0), shape.piece_bytes) == (576, 64 * 576)


def test_cross_layer_with_strides() -> None:
    whole = (10, 4, 2, 16, 8, 128)
    strides = tuple(int(s) for s in np.zeros(whole, np.uint16).strides)
    pool_array = CudaArray(whole, strides=strides)
    layout = cross_layer(pool_array, "page layer kv token head dim", block_tokens=16)
    assert layout.planes[0][0].page_bytes == 4 * 2 * 16 * 8 * 128 * 2
    assert spec_of(pool_array) == spec_of(CudaArray(whole))


def test_contiguous_caches_bind_to_device_memory() -> None:
    pair = (CudaArray((1, 8, 100, 128)), CudaArray((1, 8, 100, 128), address=2 << 40))
    layout = contiguous([pair], block_tokens=16)
    binding = bind_sequence(layout, [pair])
    shape = ShapeCache().shape(binding, 0, 32, 16, 4)
    assert shape.table["base"].tolist() == [(1 << 40) + 36 * 256, (2 << 40) + 36 * 256]
    assert shape.piece_bytes == 12 * 256


def test_what_does_not_fit_is_refused() -> None:
    array = CudaArray((10, 16, 8, 128))
    layout = paged([(array,)], "page token head dim", block_tokens=16)
    with pytest.raises(GeometryError, match="ends after"):
        Pool(layout, [CudaArray((9, 16, 8, 128))])
    with pytest.raises(GeometryError, match="ends after"):
        Pool(layout, [DeviceBytes(1 << 40, 100, "cuda:0", None)])
    both = paged([(array, np.zeros((10, 16, 8, 128), np.uint16))], "page token head dim", block_tokens=16)
    with pytest.raises(GeometryError, match="several devices"):
        Pool(both, [array, np.zeros((10, 16, 8, 128), np.uint16)])
    read_only = CudaArray((10, 16, 8, 128))
    read_only.__cuda_array_interface__["data"] = (1 << 40, True)
    with pytest.raises(GeometryError, match="read-only"):
        spec_of(read_only)
    with pytest.raises(GeometryError, match="neither"):
        spec_of(object())
    with pytest.raises(GeometryError, match="no __dlpack__"):
        borrowed(object())


def test_the_device_of_an_array_is_found() -> None:
    array = CudaArray((4,))
    array.device = _Id(3)  # type: ignore[attr-defined]
    found = device_bytes(array, 8)
    assert found is not None and found.location == "cuda:3"
    assert device_bytes(np.zeros(4), 8) is None


def test_no_engine_touches_memory_that_is_not_its_own() -> None:
    """The CPU engine fails the item; the CUDA engine refuses the batch: a wrong address ends a context."""
    array = CudaArray((10, 16, 8, 128))
    layout = paged([(array,)], "page token head dim", block_tokens=16)
    slots = Slots(1 << 16)
    item = CopyItem(0, 0, 16, 0, 0, 1, (0, 0), layout.geometry.groups[0].object_bytes(16))
    batch = CopyBatch("j", 0, "gather", Pool(layout, [array]).bind([1]), (item,))
    cpu = CpuCopyEngine(slots, threads=1)
    answers: list[Any] = []
    cpu.submit(batch, answers.append)
    assert cpu.wait_idle(10)
    cpu.close()
    assert "cuda:0" in answers[0].failed[0][1]
    cuda = CudaCopyEngine(FakeDevice(), slots, [slots.bytes])
    with pytest.raises(GeometryError, match="cuda:0"):
        cuda.submit(batch, answers.append)
    cuda.close()


def test_torch_tensors_on_the_cpu_are_as_before() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros((10, 16, 8, 16), dtype=torch.bfloat16)
    assert device_bytes(tensor, 100) is None
    pool = Pool(paged([(tensor,)], "page token head dim", block_tokens=16), [tensor])
    assert pool.views[0][0].address == tensor.data_ptr()
