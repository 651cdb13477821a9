"""What the GPU service copies by itself, in mode 'shared': the pools that it maps, and the batches that run.

Of one connection to the node: what is queued has no meaning without it.  Memory is unmapped only once no copy
that may touch it runs, which is up to streams of other processes for pools on GPUs, so nobody waits for that
without a bound: what does not end is named, and stays as it is until it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from kvtier.daemon.copy_desk import copy_item, page_tables
from kvtier.daemon.gpu_layers import RestoreLayers, Tell
from kvtier.daemon.gpu_maps import GpuMaps
from kvtier.errors import GeometryError, KvtierError
from kvtier.geometry import CUDA_IPC
from kvtier.gpu.engine import CLOSE_S, CopyBatch, CopyEngine, CopyResult
from kvtier.gpu.shared_pool import SharedPool
from kvtier.messages.tiers import Copied, Copy, PoolJoined

# Batches are some 64 MiB: one that takes this long waits for something that does not happen.
LATE_S = 10.0


class GpuCopies:
    """engine: of pools in host memory.  maps: pools on GPUs, and their engines.

    ended: told of each batch's end, from a thread of an engine's; hands it to `over` in the caller's thread.
    tell: tells a worker of a layer, from any thread.
    """

    def __init__(
        self,
        engine: CopyEngine,
        maps: GpuMaps,
        ended: Callable[[GpuCopies, str, CopyResult], None],
        tell: Tell,
    ) -> None:
        self.maps = maps
        self._layers = RestoreLayers(tell)
        self._engine = engine
        self._ended = ended
        self._pools: dict[str, SharedPool] = {}
        self._running: dict[str, dict[tuple[str, int], float]] = {}
        self._leaving: dict[str, Callable[[], None]] = {}

    def attach(self, message: PoolJoined, fds: list[int]) -> None:
        """A worker's pool in host memory; takes the descriptors over. Raises GeometryError, OSError."""
        self._pools[message.worker] = SharedPool.attach(message.pool, fds)

    def heard(self, copy: Copy) -> None:
        """The node asked for a batch, which may have to wait, or be cancelled."""
        self._layers.ended(copy.worker, copy.over)

    def begin(self, copy: Copy) -> None:
        """Copy a batch. Raises KvtierError."""
        on_gpu = copy.worker in self.maps
        batch = self.maps.batch(copy) if on_gpu else self._batch(copy)
        engine = self.maps.engine(copy.worker) if on_gpu else self._engine
        batch = self._layers.begin(copy, batch, self.maps.ring(copy.worker).relay if on_gpu else None)
        try:
            engine.submit(batch, partial(self._ended, self, copy.worker))
        except KvtierError:
            self._layers.over(copy.worker, copy.job, copy.batch, ok=False)
            raise
        self._running.setdefault(copy.worker, {})[copy.job, copy.batch] = time.monotonic()

    def _batch(self, copy: Copy) -> CopyBatch:
        pool = self._pools.get(copy.worker)
        if pool is None:
            raise GeometryError("the worker's pool is not mapped")
        return CopyBatch(
            copy.job,
            copy.batch,
            copy.direction,
            pool.pool.bind(page_tables(copy)),
            tuple(copy_item(item) for item in copy.items),
            verify=copy.verify or copy.direction == "gather",
            fidelity=copy.fidelity,
        )

    def over(self, worker: str, result: CopyResult) -> Copied:
        """A batch ended; its answer."""
        running = self._running.get(worker, {})
        running.pop((result.job, result.batch), None)
        self._layers.over(worker, result.job, result.batch, result.ok)
        self._unmap_if_quiet(worker)
        return Copied.of(result)

    def cancel(self, worker: str, job: str) -> None:
        """See CopyEngine."""
        self._engine.cancel(job)
        self.maps.cancel(worker, job)

    def leave(self, worker: str, then: Callable[[], None]) -> None:
        """Unmap the worker's pool as soon as none of its copies runs, and call `then`."""
        self._leaving[worker] = then
        self._unmap_if_quiet(worker)

    def _unmap_if_quiet(self, worker: str) -> None:
        if worker not in self._leaving or self._running.get(worker):
            return
        then = self._leaving.pop(worker)
        self._running.pop(worker, None)
        self._layers.leave(worker)
        pool = self._pools.pop(worker, None)
        if pool is not None:
            pool.close()
        self.maps.leave(worker)
        then()

    def late(self, now_s: float) -> list[str]:
        """Workers with a batch that began longer than LATE_S ago."""
        return sorted(
            worker
            for worker, running in self._running.items()
            if running and now_s - min(running.values()) > LATE_S
        )

    def mapping(self, now_s: float) -> list[str]:
        """Workers whose pools are being mapped or probed for longer than LATE_S."""
        return self.maps.probing(now_s - LATE_S)

    def stuck(self, now_s: float) -> list[str]:
        """Workers that left longer than LATE_S ago, and whose pools are still being unmapped."""
        return self.maps.unmapping(now_s - LATE_S)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """End what is queued; unmap everything once nothing runs. False when something does after the time:
        then nothing of that is unmapped, and this is to be called again."""
        end_s = time.monotonic() + timeout_s
        quiet = self._engine.close(timeout_s)
        quiet = self.maps.close(max(0.0, end_s - time.monotonic())) and quiet
        if quiet:
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()
            self._layers.clear()
        return quiet


def on_a_gpu(message: PoolJoined) -> bool:
    """Whether the pool is to be mapped by CUDA IPC, which needs a probe."""
    return message.mode == "shared" and message.pool.get("kind") == CUDA_IPC
