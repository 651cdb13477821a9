"""What the engine asks of a device: the narrow interface that CUDA and a fake for tests both have.

Not run on a GPU yet.

Streams and events are integers: CUDA's own handles, so that those of a serving engine (torch's
`stream.cuda_stream`) can be passed in as they are.  Addresses are integers too; device and host share one
address space (CUDA's unified addressing).  Every method may raise TierUnavailable with the device's message,
and then nothing more of the work in question is to be expected.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.gpu.tensors import Bytes

Stream: TypeAlias = int
Event: TypeAlias = int
Words: TypeAlias = npt.NDArray[np.uint64]
Kernel: TypeAlias = Literal["gather", "scatter", "checksum", "encode", "decode", "hash"]
# They take one segment, and two words more.
CODED: tuple[Kernel, ...] = ("encode", "decode", "hash")

TILE_BYTES = 4096
"""What one warp of the gather and scatter kernels moves at a time (KV_TILE in kv_copy.cu)."""


class Device(Protocol):
    """One GPU. Any thread may call, also while others capture graphs.

    identity: the same in every process, whatever devices it sees.  location: as pools name it, 'cuda:0'.
    context_bytes: device memory that this process's context took when it was made here; 0 where it was there
    before, or nothing tells it.
    """

    name: str
    identity: str
    location: str
    can_batch: bool
    context_bytes: int

    def enter(self) -> None:
        """Make this device the thread's own, and all it does no matter of graphs that others capture.

        For threads that do nothing but copy, at their beginning; calls of other threads need it not.
        """

    # -- streams and events

    def current_stream(self) -> Stream:
        """What the caller's thread queues its work on: torch's where torch uses the device, else cupy's."""

    def capturing(self, stream: Stream) -> bool:
        """Whether the stream is being captured into a graph."""

    def stream(self) -> Stream:
        """A new stream of the lowest priority that does not wait for the default stream."""

    def destroy_stream(self, stream: Stream) -> None:
        """Give a stream back; what is queued on it still runs."""

    def event(self, *, timed: bool = False, shared: bool = False) -> Event:
        """A new event, not recorded. timed: for elapsed_s. shared: for export_event."""

    def destroy_event(self, event: Event) -> None:
        """Give an event back."""

    def record(self, event: Event, stream: Stream) -> None:
        """The event stands for all that is queued on the stream so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is queued on the stream from now on begins after the event. The caller does not wait."""

    def done(self, event: Event) -> bool:
        """Whether what the event stands for has ended."""

    def synchronize(self, event: Event) -> None:
        """Wait, without the GIL and without spinning, until it has."""

    def elapsed_s(self, begin: Event, end: Event) -> float:
        """Seconds between two timed events that are done."""

    # -- memory

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes at least; its address."""

    def free(self, address: int) -> None:
        """Give device memory back. No work that uses it may be queued."""

    def pinned(self, nbytes: int) -> Bytes:
        """Page-locked host memory."""

    def free_pinned(self, memory: Bytes) -> None:
        """Give page-locked memory back."""

    def register(self, memory: Bytes) -> None:
        """Page-lock memory that is mapped already, and let the device reach it."""

    def unregister(self, memory: Bytes) -> None:
        """Undo register()."""

    def device_address(self, host_address: int) -> int:
        """Where kernels see this byte of registered or pinned memory."""

    def memory_info(self) -> tuple[int, int]:
        """(free, all) bytes of device memory."""

    # -- work

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """One copy between any two of pinned, registered and device memory."""

    def copy_batch(self, targets: Words, sources: Words, sizes: Words, stream: Stream) -> None:
        """Many copies in one call, in any order among themselves. Where can_batch is False, one by one."""

    def launch(
        self,
        kernel: Kernel,
        segments: int,
        count: int,
        tiles: int,
        base: int,
        stream: Stream,
        more: tuple[int, int] = (0, 0),
    ) -> None:
        """Run a kernel over `count` segments at address `segments` that have `tiles` tiles in all.

        base: what a segment's `linear` counts from; for 'checksum' the address of the results.  more: of
        those in CODED, (what codec of what values, see work.form_of; address of losses, scales or results).
        """

    # -- other processes

    def extent(self, address: int) -> tuple[int, int]:
        """(address, bytes) of the allocation or mapping that an address lies in."""

    def export_memory(self, address: int) -> tuple[bytes, int]:
        """(handle of the allocation with this address, offset in it). Raises GeometryError where CUDA has
        none: memory of expandable segments, virtual memory management, or a pool of the driver's."""

    def open_memory(self, handle: bytes) -> int:
        """Map another process's allocation; its address here."""

    def close_memory(self, address: int) -> None:
        """Unmap it."""

    def export_event(self, event: Event) -> bytes:
        """A handle of a shared event."""

    def open_event(self, handle: bytes) -> Event:
        """Another process's event, to wait for or record; destroy_event ends it here."""
