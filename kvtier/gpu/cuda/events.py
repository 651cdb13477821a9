"""Events that outlive a batch, and those that batches use again and again. Not run on a GPU yet."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from kvtier.errors import TierUnavailable
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
    """A new event, recorded on the stream now."""
    event = DeviceEvent(device, device.event())
    device.record(event._event, stream)
    return event


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
