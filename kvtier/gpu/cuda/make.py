"""Engines for workers and the GPU service: what goes into `attach(..., make_engine=...)`.

Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from kvtier.errors import GeometryError
from kvtier.gpu.cuda.cupy_device import CudaDevice
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.measure import fit
from kvtier.gpu.engine import SlotMemory
from kvtier.gpu.tensors import Bytes


@runtime_checkable
class SubArenas(Protocol):
    """Slot memory that says how many mappings it consists of, as kvtier.host.ArenaView does."""

    @property
    def sub_arenas(self) -> int:
        """How many."""

    def view(self, address: tuple[int, int], nbytes: int) -> Bytes:
        """See SlotMemory."""


def cuda_engine(
    device: Device | int = 0, settings: Settings | None = None
) -> Callable[[SlotMemory], CudaCopyEngine]:
    """Makes the engine of a pool on this device once the arena is mapped, which it registers then.

    device: its number as CUDA counts visible devices.  settings: without them the ways to move pages are
    measured now, which takes about a quarter of a second.  Raises TierUnavailable where there is no device.
    What it answers raises TierUnavailable for an arena that the driver cannot lock, GeometryError for slots
    that are not an arena's.
    """
    used = CudaDevice(device) if isinstance(device, int) else device
    chosen = settings or Settings(table=fit(used))

    def make(slots: SlotMemory) -> CudaCopyEngine:
        return CudaCopyEngine(used, slots, mappings_of(slots), settings=chosen)

    return make


def mappings_of(slots: SlotMemory) -> list[Bytes]:
    """The whole mappings that slots lie in, in order. Raises GeometryError."""
    if not isinstance(slots, SubArenas):
        raise GeometryError(f"{type(slots).__name__} does not say which mappings its slots lie in")
    return [_whole(slots.view((number, 0), 1)) for number in range(slots.sub_arenas)]


def _whole(part: Bytes) -> Bytes:
    while isinstance(part.base, np.ndarray):
        part = part.base
    return part
