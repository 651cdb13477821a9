"""Workers' pools on GPUs that this process maps by CUDA IPC, and the engines that copy them.

    said()      the node told of a worker's pool
    probe()     the worker wrote a pattern: map the pool, read it, write another; then say so
    proven()    the worker read that: from now on the mapping is used
    leave()     the worker's process is gone, or it detached, and none of its copies runs

Mapping, probing, freeing device memory and unmapping may wait for the whole device, so each is done by a
thread of its own, and nobody waits for that.  Each worker's pool has an engine of its own: its streams wait
for events of the worker's process, which may be stopped, and what another one copies must not wait behind
them.  Host memory is registered once for all.

Not run on a GPU yet: tests run it on two views of a fake device.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvtier.breaker import CHANCE, Backoff
from kvtier.daemon.copy_desk import copy_item, page_tables
from kvtier.errors import GeometryError, KvtierError, TierUnavailable
from kvtier.gpu.cuda.device import Device
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.cuda.ipc import EventRing, EventRings, MappedPool, PeerEvents, Prober, handles_of
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import CudaPlace, cuda_engine, mappings_of
from kvtier.gpu.cuda.memory import PinnedArena
from kvtier.gpu.engine import CLOSE_S, CopyBatch, SlotMemory, StreamEvent
from kvtier.gpu.shared_pool import Challenge
from kvtier.messages.tiers import Copy, PoolProbed, ProbePool

log = logging.getLogger(__name__)

FindDevice = Callable[[str], Device]
_AGAIN = Backoff(first_s=0.05, limit_s=5.0)


class Closing:
    """Closes something in a thread of its own. close: waits a bounded time, and is called until it is True.

    What fails is tried again, too, after a pause: nothing else says that no copy runs.  Where no thread can
    be had, `over` tries again.  since_s: time.monotonic() at its beginning.
    """

    def __init__(self, name: str, close: Callable[[], bool]) -> None:
        self.since_s = time.monotonic()
        self._name = name
        self._close = close
        self._over = threading.Event()
        self._starting = threading.Lock()
        self._started = False
        self._failure = ""
        self._start()

    def over(self, timeout_s: float = 0.0) -> bool:
        """Whether it is closed within the time."""
        self._start()
        return self._over.wait(timeout_s)

    def _start(self) -> None:
        with self._starting:
            if self._started:
                return
            try:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
                self._started = True
            except RuntimeError as error:
                if not self._failure:
                    log.warning("%s waits for a thread: %s", self._name, error)
                self._failure = str(error)

    def _run(self) -> None:
        failures = 0
        while not self._over.is_set():
            try:
                if self._close():
                    self._over.set()
            except (KvtierError, OSError, RuntimeError) as error:
                failures += 1
                log.error("%s failed, and is tried again: %r", self._name, error)
                self._over.wait(_AGAIN.delay_s(failures, CHANCE()))


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A worker's mapped pool, and its engine. events: the worker's. ring: this process's, of layers.

    rings: where the ring came from.
    """

    device: Device
    engine: CudaCopyEngine
    pool: MappedPool
    events: PeerEvents
    ring: EventRing
    rings: EventRings

    def answer(self, message: ProbePool, may_write: Callable[[], None]) -> PoolProbed:
        """This side's part of a probe. Raises KvtierError."""
        challenge = Challenge(tuple(message.pages), message.nonce)
        answer = Prober(self.device, self.pool.pool).answer(challenge, may_write)
        return PoolProbed(ok=True, seen=answer.seen, written=answer.written, events=self.ring.handles())

    def close(self) -> bool:
        """Whether no copy runs any more within CLOSE_S; only then anything is unmapped."""
        if not self.engine.close(CLOSE_S):
            return False
        # A device that is lost takes nothing back; the end of the process does.  Nothing is given back twice.
        give = partial(self.rings.give, self.ring)
        for close in (self.device.enter, self.events.close, give, self.pool.close):
            try:
                close()
            except (KvtierError, OSError, RuntimeError) as error:
                log.warning("part of what a worker's pool took stays until this process ends: %s", error)
        return True


class _Map:
    """A worker's pool from its first probe on. mapped: what there is of it; None before that.

    make: maps it, raising KvtierError.  probing_s: time.monotonic() since when a probe is under way.
    latest: the worker's last probe: the scratch pages are that one's, and none before it is answered.
    """

    def __init__(self, make: Callable[[], _Mapped]) -> None:
        self.mapped: _Mapped | None = None
        self.probing_s = math.inf
        self.latest: ProbePool | None = None
        self._make = make
        self._left = False
        # Of who maps, probes or closes.
        self._one = threading.Lock()

    def probe(self, message: ProbePool) -> PoolProbed:
        """Map the pool, unless it is, and play this side's part; or say why that cannot be."""

        def may_write() -> None:
            self._stay()
            if self.latest is not message:
                raise TierUnavailable("the worker has begun another probe")

        with self._one:
            self.probing_s = time.monotonic()
            try:
                self._stay()
                if self.mapped is None:
                    self.mapped = self._make()
                # Mapping may have taken long: the pages may be another probe's by now, or the worker's own.
                may_write()
                self.mapped.device.enter()
                return self.mapped.answer(message, may_write)
            except (KvtierError, OSError, RuntimeError) as error:
                return PoolProbed(ok=False, detail=str(error))
            finally:
                self.probing_s = math.inf

    def _stay(self) -> None:
        if self._left:
            raise TierUnavailable("the worker has left")

    def leave(self) -> None:
        """From now on nothing is mapped, and no probe begins to write. Does not wait for one that does."""
        self._left = True

    def close(self) -> bool:
        """Whether nothing of it is left within a time, a probe that wrote already included."""
        self.leave()
        if not self._one.acquire(timeout=CLOSE_S):
            return False
        try:
            return self.mapped is None or self.mapped.close()
        finally:
            self._one.release()


class GpuMaps:
    """All of them, over one arena.

    find: a device by its identity.  rings: of this process, whatever nodes it serves.  settings: of engines;
    None measures.
    """

    def __init__(
        self, slots: SlotMemory, find: FindDevice, rings: EventRings, settings: Settings | None = None
    ) -> None:
        self._slots, self._find, self._rings, self._settings = slots, find, rings, settings
        self._said: dict[str, dict[str, Any]] = {}
        self._maps: dict[str, _Map] = {}
        self._leaving: list[tuple[str, Closing]] = []
        self._places: dict[str, CudaPlace] = {}
        self._arena: PinnedArena | None = None
        # Of who makes a device's place, or registers the arena, for all.
        self._making = threading.Lock()

    def __contains__(self, worker: str) -> bool:
        return worker in self._said

    @property
    def device_bytes(self) -> dict[str, int]:
        """GPU memory that each mapped worker's engine takes, without the process's CUDA contexts."""
        held = {worker: each.mapped for worker, each in self._maps.items()}
        return {worker: mapped.engine.device_bytes for worker, mapped in held.items() if mapped is not None}

    @property
    def context_bytes(self) -> int:
        """GPU memory of this process's CUDA contexts; 0 where nothing tells it."""
        return sum(place.gpu.context_bytes for place in list(self._places.values()))

    def said(self, worker: str, description: dict[str, Any]) -> None:
        """A worker attached with this pool."""
        self._said[worker] = description

    def probe(self, worker: str, message: ProbePool, answered: Callable[[PoolProbed], None]) -> None:
        """Map the worker's pool in the background, unless it is, and play this side's part.

        answered: told the outcome, from any thread.
        """
        if worker not in self._maps:
            self._maps[worker] = _Map(partial(self._map, self._said[worker]))
        held = self._maps[worker]
        held.latest = message
        work = threading.Thread(
            target=lambda: answered(held.probe(message)), name=f"kvtier-map-{worker}", daemon=True
        )
        try:
            work.start()
        except RuntimeError as error:
            answered(PoolProbed(ok=False, detail=str(error)))

    def outdate(self, worker: str) -> None:
        """The worker is going to begin another probe: none from before may write any more."""
        if worker in self._maps:
            self._maps[worker].latest = None

    def probing(self, before_s: float) -> list[str]:
        """Workers whose probe began before this time.monotonic(), and has not ended."""
        return sorted(worker for worker, held in self._maps.items() if held.probing_s < before_s)

    def batch(self, copy: Copy) -> CopyBatch:
        """The engine's batch for a Copy. Raises GeometryError."""
        held = self._mapped(copy.worker)
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
        """The engine of the worker's pool."""
        return self._mapped(worker).engine

    def ring(self, worker: str) -> EventRing:
        """The events here that the worker's streams can wait for."""
        return self._mapped(worker).ring

    def cancel(self, worker: str, job: str) -> None:
        """See CopyEngine."""
        held = self._maps.get(worker)
        if held is not None and held.mapped is not None:
            held.mapped.engine.cancel(job)

    def leave(self, worker: str) -> None:
        """Unmap, in the background: the worker's memory is its own again, or the device's.

        What still runs there stays mapped until it ends; see `unmapping`.
        """
        self._said.pop(worker, None)
        self._leaving = [(left, closing) for left, closing in self._leaving if not closing.over()]
        if (held := self._maps.get(worker)) is not None:
            held.leave()
            # In this order whoever looks from another thread sees it in one of the two.
            self._leaving.append((worker, Closing(f"kvtier-unmap-{worker}", held.close)))
            del self._maps[worker]

    def unmapping(self, before_s: float) -> list[str]:
        """Workers whose unmapping began before this time.monotonic(), and has not ended."""
        return sorted(
            worker for worker, closing in self._leaving if not closing.over() and closing.since_s < before_s
        )

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """End the engines, whose batches are answered, and unmap all.

        False when copies still run after the time: their memory stays mapped.  To be called again then.
        """
        end_s = time.monotonic() + timeout_s
        for worker in list(self._said):
            self.leave(worker)
        if not all(closing.over(max(0.0, end_s - time.monotonic())) for _, closing in self._leaving):
            return False
        if self._arena is not None:
            with suppress(TierUnavailable):
                self._arena.close()
            self._arena = None
        return True

    def _mapped(self, worker: str) -> _Mapped:
        held = self._maps.get(worker)
        if held is None or held.mapped is None:
            raise GeometryError("the worker's pool is not mapped")
        return held.mapped

    def _map(self, said: dict[str, Any]) -> _Mapped:
        identity, handles = said.get("device"), handles_of(said, "events")
        if not isinstance(identity, str):
            raise GeometryError("the description of a pool is malformed")
        with self._making:
            if identity not in self._places:
                self._places[identity] = cuda_engine(self._find(identity), self._settings)
            place = self._places[identity]
            device = place.gpu
            device.enter()
            if self._arena is None:
                self._arena = PinnedArena(device, mappings_of(self._slots))
            arena = self._arena
        with ExitStack() as undo:
            pool = MappedPool.attach(device, said)
            undo.callback(pool.close)
            events = PeerEvents(device, handles)
            undo.callback(events.close)
            ring = self._rings.take(device)
            undo.callback(self._rings.give, ring)
            made = _Mapped(device, place(self._slots, arena), pool, events, ring, self._rings)
            undo.pop_all()
        return made
