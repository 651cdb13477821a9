"""Workers' pools on GPUs that this process maps by CUDA IPC, and the engines that copy them.

    said()      the node told of a worker's pool
    probe()     the worker wrote a pattern: map the pool, read it, write another
    proven()    the worker read that: from now on the mapping is used
    leave()     the worker's process is gone, or it detached, and none of its copies runs

Not run on a GPU yet: tests run it on two views of a fake device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvtier.daemon.copy_desk import copy_item, page_tables
from kvtier.errors import GeometryError, KvtierError, TierUnavailable
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.ipc import MappedPool, PeerEvents, Prober
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import cuda_engine
from kvtier.gpu.engine import CopyBatch, SlotMemory, StreamEvent
from kvtier.gpu.shared_pool import Challenge
from kvtier.tier_messages import Copy, PoolProbed, ProbePool

FindDevice = Callable[[str], Device]


@dataclass(slots=True)
class _Map:
    """A worker's mapped pool. device: its identity."""

    device: str
    pool: MappedPool
    events: PeerEvents

    def close(self) -> None:
        self.events.close()
        self.pool.close()


class GpuMaps:
    """All of them, over one arena. find: a device by its identity. settings: of engines; None measures."""

    def __init__(self, slots: SlotMemory, find: FindDevice, settings: Settings | None = None) -> None:
        self._slots, self._find, self._settings = slots, find, settings
        self._said: dict[str, dict[str, Any]] = {}
        self._maps: dict[str, _Map] = {}
        self._devices: dict[str, Device] = {}
        self._engines: dict[str, CudaCopyEngine] = {}

    def __contains__(self, worker: str) -> bool:
        return worker in self._said

    @property
    def device_bytes(self) -> int:
        """GPU memory that the engines take, without the process's CUDA contexts."""
        return sum(engine.device_bytes for engine in self._engines.values())

    def said(self, worker: str, description: dict[str, Any]) -> None:
        """A worker attached with this pool."""
        self._said[worker] = description

    def probe(self, worker: str, message: ProbePool) -> PoolProbed:
        """Map the worker's pool, unless it is, and play this side's part; or say why that cannot be."""
        try:
            held = self._maps.get(worker) or self._map(worker)
            device = self._devices[held.device]
            device.enter()
            challenge = Challenge(tuple(message.pages), message.nonce)
            answer = Prober(device, held.pool.pool).answer(challenge)
        except KvtierError as error:
            return PoolProbed(ok=False, detail=str(error))
        return PoolProbed(ok=True, seen=answer.seen, written=answer.written)

    def batch(self, copy: Copy) -> CopyBatch:
        """The engine's batch for a Copy. Raises GeometryError."""
        held = self._maps[copy.worker]
        events = [held.events.event(number) for number in copy.events]
        layers = sum(len(group.layers) for group in held.pool.pool.layout.groups)
        if len(events) not in (0, 1, layers):
            raise GeometryError(f"{len(events)} events for a pool of {layers} layers")
        by_layer: tuple[StreamEvent, ...] = tuple(events) if len(events) == layers else ()
        return CopyBatch(
            copy.job,
            copy.batch,
            copy.direction,
            held.pool.pool.bind(page_tables(copy)),
            tuple(copy_item(item) for item in copy.items),
            verify=copy.verify or copy.direction == "gather",
            after=events[0] if events and not by_layer else None,
            after_layers=by_layer,
            fidelity=copy.fidelity,
        )

    def engine(self, worker: str) -> CudaCopyEngine:
        """The engine of the worker's device."""
        return self._engines[self._maps[worker].device]

    def cancel(self, worker: str, job: str) -> None:
        """See CopyEngine."""
        if worker in self._maps:
            self.engine(worker).cancel(job)

    def leave(self, worker: str) -> None:
        """Unmap: the worker's memory is its own again, or the device's. None of its copies may run."""
        self._said.pop(worker, None)
        held = self._maps.pop(worker, None)
        if held is not None:
            self._devices[held.device].enter()
            held.close()

    def close(self) -> None:
        """End the engines, whose batches are answered, and unmap all."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        for worker in list(self._said):
            self.leave(worker)

    def _map(self, worker: str) -> _Map:
        said = self._said[worker]
        identity, handles = said.get("device"), said.get("events")
        if not isinstance(identity, str) or not isinstance(handles, list):
            raise GeometryError("the description of a pool is malformed")
        if identity not in self._devices:
            self._devices[identity] = self._find(identity)
        device = self._devices[identity]
        device.enter()
        if identity not in self._engines:
            self._engines[identity] = cuda_engine(device, self._settings)(self._slots)
        pool = MappedPool.attach(device, said)
        try:
            self._maps[worker] = _Map(identity, pool, PeerEvents(device, [bytes(each) for each in handles]))
        except (TierUnavailable, TypeError) as error:
            pool.close()
            raise GeometryError(f"the worker's events cannot be opened: {error}") from error
        return self._maps[worker]
