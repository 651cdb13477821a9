"""A pool of `pool_cases` in a device's memory, fake or real, for tests that run on both."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.pool import Pool
from kvtier.gpu.tensors import Bytes, DeviceBytes
from kvtier.testing.fake_device_rig import flat
from kvtier.testing.pool_cases import Case


class Uploaded:
    """The case's tensors on the device. `pool` is over them; the case itself stays in host memory."""

    def __init__(self, device: Device, case: Case) -> None:
        self._device = device
        self.case = case
        self._stream = device.stream()
        self._roots: dict[int, tuple[Bytes, int]] = {}
        parts = []
        for tensor, buffer in zip(case.tensors, case.layout.buffers, strict=True):
            root = flat(tensor)
            host = int(root.ctypes.data)
            if host not in self._roots:
                self._roots[host] = (root, device.allocate(root.nbytes))
            address = self._roots[host][1] + int(tensor.ctypes.data) - host
            parts.append(DeviceBytes(address, buffer.nbytes, device.location, None))
        self.pool = Pool(case.layout, parts)
        self.upload()

    def upload(self) -> None:
        """Make the device's memory what the case's is."""
        for root, address in self._roots.values():
            self._through_pinned(root, address, up=True)

    def download(self) -> None:
        """Make the case's memory what the device's is."""
        for root, address in self._roots.values():
            self._through_pinned(root, address, up=False)

    def _through_pinned(self, root: Any, address: int, *, up: bool) -> None:
        pinned = self._device.pinned(root.nbytes)
        if up:
            pinned[:] = root
        there = int(pinned.ctypes.data)
        target, source = (address, there) if up else (there, address)
        self._device.copy(target, source, root.nbytes, self._stream)
        mark(self._device, self._stream).synchronize()
        if not up:
            np.copyto(root, pinned)
        self._device.free_pinned(pinned)

    def close(self) -> None:
        """Free the device's memory."""
        for _, address in self._roots.values():
            self._device.free(address)
        self._device.destroy_stream(self._stream)
