"""The second mode on a fake GPU: a node whose GPU service maps a worker's pool and copies by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import kvtier
from kvtier.client.worker import Worker
from kvtier.daemon.embedded import Embedded
from kvtier.daemon.gpu_maps import GpuMaps
from kvtier.daemon.gpu_service import GpuService
from kvtier.gpu.cuda.ipc import EventRings
from kvtier.gpu.cuda.ipc_pool import IpcPool
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import cuda_engine
from kvtier.gpu.cuda.ways import always
from kvtier.gpu.pool import Pool
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_gpu import FakeGpu
from kvtier.testing.kv_memory import LAYERS, SHARD, KvMemory, pages_for, tokens_of
from kvtier.waiting import wait_until

COUNT = 200
PAGES, OTHER, SCRATCH = pages_for(COUNT), pages_for(COUNT, 20), [62, 63]
SETTINGS = Settings(always("staged"), 2, 16384)


class World:
    """A GPU, a worker's view of it and the service's, a node, and a pool. kind: of its memory."""

    def __init__(self, kind: str = "device") -> None:
        self.gpu = FakeGpu(3)
        self.mine, self.theirs = FakeDevice(gpu=self.gpu), FakeDevice(gpu=self.gpu)
        # Messages go both ways all the time: what one process has waited for has happened for the other.
        self.theirs._host = self.mine._host
        self.memory = KvMemory()
        for plane in self.memory.planes:
            self.mine.adopt(plane.reshape(-1).view(np.uint8), kind=kind)
        self.rings = EventRings()
        self.daemon = Embedded({})
        self.daemon.gpu = GpuService(self.daemon.config, make_maps=self.maps)
        self.found: Callable[[str], FakeDevice] = lambda identity: self.theirs
        self.daemon.start()
        self.kv = kvtier.connect(str(self.daemon.socket_path))
        pool = self.memory.pool
        assert isinstance(pool, Pool)
        self.pool = IpcPool(pool, cuda_engine(self.mine, SETTINGS), SCRATCH)

    def maps(self, slots: Any) -> GpuMaps:
        """What the service maps, over these slots."""
        return GpuMaps(slots, lambda identity: self.found(identity), self.rings, SETTINGS)

    def attach(self) -> Worker:
        """A worker whose pool the service is to map."""
        return self.kv.attach(self.memory.model, self.pool, shard=SHARD)

    def mode(self) -> str:
        """What the node says of the worker; "" while it attaches again."""
        workers = self.kv.status().workers
        return workers[0].mode if workers else ""

    def compute(self, stream: int, layers: range = range(LAYERS)) -> None:
        """Queue what a model would write."""
        other = KvMemory()
        other.put(1, PAGES, COUNT)
        for plane in range(2 * layers.start, 2 * layers.stop):
            for page in PAGES:
                self.mine.write(self.memory.planes[plane][page], other.planes[plane][page], stream)

    def turn(self, worker: Worker, **how: Any) -> None:
        """Park and restore, bits compared."""
        assert worker.park("chat", tokens_of(1, COUNT), PAGES, **how).result(20).ok
        self.memory.poison(OTHER)
        got = worker.restore_async(worker.plan("chat", tokens_of(1, COUNT)), OTHER, deadline_s=20)
        assert got.result(20).tokens == COUNT
        assert self.memory.front(1, OTHER, COUNT) == COUNT
        assert got.layer_ready(0)

    def end(self) -> None:
        """Close everything; nothing of either view may be left."""
        self.gpu.go_on()
        self.kv.close()
        self.daemon.close()
        self.pool.close()
        self.pool.place.rings.close()
        self.rings.close()
        assert not self.theirs.leaks() and not self.mine.leaks() and not self.gpu.fault


class Second:
    """Another worker of the same GPU, with a pool and a stream of its own."""

    def __init__(self, world: World) -> None:
        self.device, self.memory = world.mine, KvMemory(revision="org/other@1")
        for plane in self.memory.planes:
            self.device.adopt(plane.reshape(-1).view(np.uint8))
        pool = self.memory.pool
        assert isinstance(pool, Pool)
        self.pool = IpcPool(pool, cuda_engine(self.device, SETTINGS), SCRATCH)
        self.stream = self.device.stream()
        self.worker = world.kv.attach(self.memory.model, self.pool, shard=SHARD)
        assert wait_until(lambda: {w.mode for w in world.kv.status().workers} == {"shared"}, 10)

    def __enter__(self) -> Second:
        return self

    def __exit__(self, *why: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach, and give back what it took."""
        self.worker.close()
        self.pool.close()
        self.pool.place.rings.close()
        self.device.destroy_stream(self.stream)
