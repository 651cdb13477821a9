"""The fake device or this machine's first GPU, for tests that run on either."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvtier.errors import TierUnavailable
from kvtier.gpu.cuda.cupy_device import CudaDevice
from kvtier.gpu.cuda.device import Device
from kvtier.testing.fake_device import FakeDevice


def either_device(kind: str) -> Iterator[Device]:
    """For a fixture. kind: 'fake', looked over at the end, or 'cuda', which skips where there is none."""
    if kind == "fake":
        fake = FakeDevice(5)
        yield fake
        assert not fake.races and not fake.leaks() and not fake.gpu.fault
        return
    try:
        made = CudaDevice(0)
    except TierUnavailable as error:
        pytest.skip(str(error))
    made.enter()
    yield made
