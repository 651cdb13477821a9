"""The fake device or this machine's first GPU, for tests that run on either."""

from __future__ import annotations

from collections.abc import Iterator

from kvtier.gpu.cuda.cupy_device import CudaDevice
from kvtier.gpu.cuda.device import Device
from kvtier.testing.fake_device import FakeDevice


def either_device(kind: str) -> Iterator[Device]:
    """For a fixture. kind: 'fake', looked over at the end, or 'cuda'.

    Whoever asks for tests on a GPU where none can be used is told so, by TierUnavailable: were they skipped,
    all of them would be once one of them broke the device.
    """
    if kind == "fake":
        fake = FakeDevice(5)
        yield fake
        assert not fake.races and not fake.leaks() and not fake.gpu.fault
        return
    made = CudaDevice(0)
    made.enter()
    yield made
