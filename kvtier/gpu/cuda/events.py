"""Events that outlive a batch, and those that batches use again and again. Not run on a GPU yet."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cuda.device import Device, Event, Stream


class DeviceEvent:
    """A device's event as users see it (kvtier.gpu.engine.StreamEvent); it ends with its last user."""

    __slots__ = ("_device", "_event")

    def __init__(self, device: Device, event: Event) -> None:
        self._device, self._event = device, event

    def __del__(self) -> None:
        with suppress(TierUnavailable):
            self._device.destroy_event(self._event)

    def done(self) -> bool:
        """See StreamEvent."""
        return self._device.done(self._event)

    def wait(self, stream: Stream) -> None:
        """See StreamEvent."""
        self._device.wait(stream, self._event)

    def synchronize(self) -> None:
        """See StreamEvent."""
        self._device.synchronize(self._event)


def mark(device: Device, stream: Stream) -> DeviceEvent:
    """A new event, recorded on the stream now. Not while the stream is captured into a graph."""
    event = DeviceEvent(device, device.event())
    device.record(event._event, stream)
    return event


class BorrowedEvent:
    """A framework's event, which stays the framework's: kept alive, never destroyed here."""

    __slots__ = ("_device", "_event", "_owner")

    def __init__(self, device: Device, event: Event, owner: object) -> None:
        self._device, self._event, self._owner = device, event, owner

    def done(self) -> bool:
        """See StreamEvent."""
        return self._device.done(self._event)

    def wait(self, stream: Stream) -> None:
        """See StreamEvent."""
        self._device.wait(stream, self._event)

    def synchronize(self) -> None:
        """See StreamEvent."""
        self._device.synchronize(self._event)


def stream_handle(device: Device, stream: Any) -> Stream:
    """The handle of a stream of torch, cupy or anything with `__cuda_stream__`, or a handle as it is.

    None is the caller's current stream of the device.  Raises GeometryError, TierUnavailable.
    """
    if stream is None:
        return device.current_stream()
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    raise GeometryError(
        f"{type(stream).__name__} is no stream of a GPU", fix="pass torch's, cupy's, a handle, or None"
    )


def borrowed_event(device: Device, event: Any) -> BorrowedEvent:
    """An event of torch or cupy, to wait for. Raises GeometryError for one that was never recorded.

    Only torch tells that: CUDA takes an event that was never recorded for one that is done.
    """
    handle = getattr(event, "cuda_event", None)
    if handle is None:
        handle = getattr(event, "ptr", None)
    if handle is None:
        raise GeometryError(
            f"{type(event).__name__} is no event of a GPU", fix="pass torch's, cupy's, or worker.mark()'s"
        )
    if not int(handle):
        raise GeometryError("an event that was never recorded says nothing", fix="record it, then park")
    return BorrowedEvent(device, int(handle), event)


class EventPool:
    """Events of one lane. take() and give() from any thread."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: deque[Event] = deque()

    def take(self) -> Event:
        """An event that nobody waits for."""
        try:
            return self._free.popleft()
        except IndexError:
            return self._device.event()

    def give(self, events: list[Event]) -> None:
        """These are done."""
        self._free.extend(events)

    def close(self) -> None:
        """Destroy what was given back."""
        while self._free:
            self._device.destroy_event(self._free.popleft())
