"""Engines for workers and the GPU service: what goes into `attach(..., make_engine=...)`.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda.cupy_device import CudaDevice, identities
from kvtier.gpu.cuda.device import Device, Stream
from kvtier.gpu.cuda.engine import DIRECTIONS, CudaCopyEngine
from kvtier.gpu.cuda.events import borrowed_event, mark, stream_handle
from kvtier.gpu.cuda.ipc import EventRings
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.measure import fit
from kvtier.gpu.cuda.memory import PinnedArena
from kvtier.gpu.engine import Place, SlotMemory, StreamEvent
from kvtier.gpu.tensors import Bytes


@runtime_checkable
class SubArenas(Protocol):
    """Slot memory that says how many mappings it consists of, as kvtier.host.ArenaView does."""

    @property
    def sub_arenas(self) -> int:
        """How many."""

    def view(self, address: tuple[int, int], nbytes: int) -> Bytes:
        """See SlotMemory."""


class CudaPlace(Place):
    """A GPU: makes the engine of a pool on it once the arena is mapped, which it registers then.

    rings: events of this process for pools that another one maps.

    What it is called with raises TierUnavailable for an arena that the driver cannot lock, GeometryError for
    slots that are not an arena's.
    """

    engine = "cuda"

    def __init__(self, device: Device, settings: Settings) -> None:
        self._device, self._settings = device, settings
        self.rings = EventRings()
        self.location, self.device = device.location, device.name

    def __call__(self, slots: SlotMemory, arena: PinnedArena | None = None) -> CudaCopyEngine:
        """See Place. arena: the slots' mappings, where they are registered already."""
        return CudaCopyEngine(self._device, slots, arena or mappings_of(slots), settings=self._settings)

    @property
    def gpu(self) -> Device:
        """The device itself."""
        return self._device

    @property
    def device_bytes(self) -> int:
        """See Place: the staging rings; descriptors come with the batches, some kilobytes each."""
        return len(DIRECTIONS) * self._settings.staging_slots * self._settings.staging_slot_bytes

    def stream(self, stream: Any) -> Stream:
        """See Place."""
        return stream_handle(self._device, stream)

    def mark(self, stream: Any = None) -> StreamEvent:
        """See Place."""
        handle = stream_handle(self._device, stream)
        if self._device.capturing(handle):
            raise GeometryError(
                "the stream is being captured into a graph", fix="park and restore outside of the capture"
            )
        return mark(self._device, handle)

    def event(self, event: Any) -> StreamEvent:
        """See Place."""
        return event if isinstance(event, StreamEvent) else borrowed_event(self._device, event)


def cuda_engine(device: Device | int = 0, settings: Settings | None = None) -> CudaPlace:
    """The place of pools on this device, for `attach(..., make_engine=...)`.

    device: its number as CUDA counts visible devices.  settings: without them the ways to move pages are
    measured now, which takes about a quarter of a second.  Raises TierUnavailable where there is no device.
    """
    used = CudaDevice(device) if isinstance(device, int) else device
    return CudaPlace(used, settings or Settings(table=fit(used)))


def device_of(identity: str) -> CudaDevice:
    """The device with this identity, whatever its number is here; no context is made on any other.

    Raises TierUnavailable.
    """
    there = identities()
    if identity not in there:
        raise TierUnavailable(
            f"there is no CUDA device {identity} here, but {', '.join(there) or 'none'}",
            fix="let the GPU service see the workers' devices (CUDA_VISIBLE_DEVICES, --gpus)",
        )
    return CudaDevice(there.index(identity))


def mappings_of(slots: SlotMemory) -> list[Bytes]:
    """The whole mappings that slots lie in, in order. Raises GeometryError."""
    if not isinstance(slots, SubArenas):
        raise GeometryError(f"{type(slots).__name__} does not say which mappings its slots lie in")
    return [_whole(slots.view((number, 0), 1)) for number in range(slots.sub_arenas)]


def _whole(part: Bytes) -> Bytes:
    while isinstance(part.base, np.ndarray):
        part = part.base
    return part
