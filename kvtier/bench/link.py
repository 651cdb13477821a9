"""Plain copies between registered host memory and a GPU: what the link does at best. Not run on a GPU yet."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.events import mark
from kvtier.gpu.engine import Direction

DIRECTIONS: tuple[Direction, ...] = ("gather", "scatter")


class Link:
    """host, there: addresses of registered host memory and of device memory."""

    def __init__(self, device: Device, host: int, there: int) -> None:
        self._device, self._host, self._there = device, host, there
        self._streams = {direction: device.stream() for direction in DIRECTIONS}

    def seconds(self, directions: Sequence[Direction], nbytes: int, offset: int = 0) -> float:
        """One copy in each of these directions, at once; the second one `offset` bytes further on."""
        begun = time.perf_counter()
        ends = []
        for n, direction in enumerate(directions):
            host, there = self._host + n * offset, self._there + n * offset
            target, source = (host, there) if direction == "gather" else (there, host)
            self._device.copy(target, source, nbytes, self._streams[direction])
            ends.append(mark(self._device, self._streams[direction]))
        for end in ends:
            end.synchronize()
        return time.perf_counter() - begun

    def close(self) -> None:
        """Give the streams back."""
        for stream in self._streams.values():
            self._device.destroy_stream(stream)
