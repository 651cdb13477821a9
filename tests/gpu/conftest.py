"""A fake device with a pool on it, and an engine for each way to move pages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.ways import WAYS, always
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_slots import BLOCK, LAYERS, PAGES, P, Slots


@pytest.fixture
def slots() -> Slots:
    return Slots()


@pytest.fixture(params=WAYS)
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(always(request.param), 2, 8192, 1 << 16)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice(7)


@pytest.fixture
def engine(slots: Slots, device: FakeDevice, settings: Settings) -> Iterator[CudaCopyEngine]:
    made = CudaCopyEngine(device, slots, [slots.bytes], settings=settings)
    yield made
    made.close()
    assert device.gpu.fault or not device.leaks()


@pytest.fixture
def tensors(device: FakeDevice) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 65536, (2, PAGES, P, 2, 8), dtype=np.uint16) for _ in range(LAYERS)]
    for tensor in made:
        device.adopt(tensor.reshape(-1).view(np.uint8))
    return made


@pytest.fixture
def pool(tensors: list[np.ndarray]) -> Pool:
    return Pool(paged([(t,) for t in tensors], "kv page token head dim", block_tokens=BLOCK), tensors)
