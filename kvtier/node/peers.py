"""Workers and services that come, go and die.

A closed connection takes rights away; only the end of a process, its own word, or a batch's answer proves
that none of its copies runs any more.
"""

from __future__ import annotations

from kvtier.errors import FingerprintError, GeometryError, ModelSpecError, ProtocolError
from kvtier.messages.calls import Attach, Attached, Done, Prefilled
from kvtier.messages.tiers import Arenas, GpuUsage, PoolJoined, PoolLeft, TierHello
from kvtier.node import limits
from kvtier.node.adoption import Adoption
from kvtier.node.copies import Copies, CopyJob
from kvtier.node.disk_side import DiskSide
from kvtier.node.park_job import ParkJob
from kvtier.node.parks import Parks
from kvtier.node.plans import Plans
from kvtier.node.ranks import check_ranks
from kvtier.node.restore_job import RestoreJob
from kvtier.node.restores import Restores
from kvtier.node.state import NodeState, Worker
from kvtier.objects import KEY_BYTES
from kvtier.policy.interfaces import PrefillRate
from kvtier.receipts import Reason

_MOST_DEVICES = 65536


class Peers:
    """Knows who is there, and ends what those who left had begun."""

    def __init__(
        self,
        state: NodeState,
        copies: Copies,
        disk: DiskSide,
        adoption: Adoption,
        parks: Parks,
        plans: Plans,
        restores: Restores,
    ) -> None:
        self._state = state
        self._copies = copies
        self._disk = disk
        self._parks = parks
        self._plans = plans
        self._restores = restores
        self._adoption = adoption

    # --- coming -----------------------------------------------------------------------------------------

    def attach(self, peer: str, message: Attach, arena_bytes: list[int], generation_slots: int) -> None:
        """Answer an Attach. Raises FingerprintError, GeometryError."""
        _check_attach(message)
        check_ranks(message)
        state = self._state
        for other in state.workers.values():
            _check_same(message, other)
        rate = self._rate(message)
        former = state.workers.get(message.replaces)
        if former is not None:
            self._all_quiet(former)
        if len(state.workers) >= limits.MOST_WORKERS:
            raise ProtocolError(f"this node has {limits.MOST_WORKERS} workers", fix="detach those not in use")
        name = state.next_id("worker:")
        worker = Worker(
            name,
            peer,
            message.fingerprint,
            message.model,
            message.geometry,
            message.shard,
            message.mode,
            message.layout,
            message.pool_pages,
            message.pool,
            rate=rate,
            ranks=tuple(message.ranks) if len(message.ranks) > 1 else (),
            engine=message.engine,
            place=message.place,
            gpu_bytes=message.gpu_bytes,
        )
        state.workers[name] = worker
        state.models[message.fingerprint] = message.model
        state.item_bytes[message.fingerprint] = message.geometry.item_bytes
        answer = Attached(
            id=message.id,
            worker=name,
            arena_bytes=arena_bytes,
            generation_slots=generation_slots,
            gpu_socket=state.gpu_address,
            mode=message.mode,
            joins_ranks=True,
        )
        state.send(peer, answer, "arenas")
        if state.gpu_peer:
            self._introduce(worker)

    def _rate(self, message: Attach) -> PrefillRate | None:
        """How fast the worker computes; None where it does not show its model. Raises ModelSpecError."""
        if not message.config:
            return None
        if not 1 <= message.devices <= _MOST_DEVICES:
            raise ProtocolError(
                f"devices is {message.devices}", fix="give the size of the tensor-parallel group"
            )
        model = message.fingerprint.hex()
        try:
            return self._state.policies.rates.rate_of(model, message.config, message.device, message.devices)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            # A config with the right keys and values of the wrong kinds.
            raise ModelSpecError(
                f"the model's config cannot be read: {error!r}", fix="pass its config.json as it is"
            ) from error

    def prefilled(self, peer: str, message: Prefilled) -> None:
        """A worker tells how long a prefill took. Raises ProtocolError."""
        worker = self.worker(message.worker, peer)
        if worker.rate is not None:
            worker.rate.observed(message.past, message.tokens, message.seconds)
            self._state.counters.eta.prefills += 1
        self._state.send(peer, Done(id=message.id))

    def service_joined(
        self, peer: str, message: TierHello, arena_bytes: list[int], generation_slots: int
    ) -> None:
        """A tier service is ready to work."""
        state = self._state
        arenas = Arenas(arena_bytes=arena_bytes, generation_slots=generation_slots, takes_gpu_usage=True)
        if peer.startswith("disk"):
            self._disk.joined(peer, message.pid, message.capacity_bytes)
            self._adoption.begin()
            state.send(peer, arenas, "arenas")
            return
        if state.gpu_peer:
            self._gpu_left(state.gpu_peer)
        for former in [p for p, pid in state.pids.items() if pid == message.pid and p != peer]:
            # A service connects again only after every copy of a former connection has ended.
            self._executor_ended(former)
        state.gpu_peer, state.gpu_address = peer, message.address
        state.send(peer, arenas, "arenas")
        for worker in state.workers.values():
            if worker.connected:
                self._introduce(worker)

    def gpu_usage(self, peer: str, message: GpuUsage) -> None:
        """What the GPU service takes of its workers' GPUs."""
        if peer != self._state.gpu_peer:
            return
        self._state.gpu_said = message
        for name, nbytes in message.workers.items():
            if name in self._state.workers:
                self._state.workers[name].gpu_bytes = nbytes

    def _introduce(self, worker: Worker) -> None:
        message = PoolJoined(
            worker=worker.name,
            geometry=worker.geometry,
            mode=worker.mode,
            layout=worker.layout,
            pool_pages=worker.pool_pages,
            pool=worker.pool,
        )
        self._state.send(self._state.gpu_peer, message, "pool" if worker.mode == "shared" else "")

    # --- going ------------------------------------------------------------------------------------------

    def detach(self, name: str, peer: str) -> None:
        """The worker goes, and says that none of its copies runs. Raises ProtocolError."""
        self._all_quiet(self.worker(name, peer))

    def _all_quiet(self, worker: Worker) -> None:
        """The worker is gone, and none of the copies in its process runs."""
        self._worker_left(worker, "cancelled")
        for job in self._jobs_of(worker):
            # Copies of a shared pool are not the worker's to speak of.
            if worker.mode == "worker":
                self._proven_quiet(job)
        self._state.workers.pop(worker.name, None)

    def left(self, peer: str) -> None:
        """A connection closed."""
        state = self._state
        if peer == state.disk.peer:
            self._disk.lost()
        elif peer == state.gpu_peer:
            self._gpu_left(peer)
        for worker in [w for w in state.workers.values() if w.peer == peer]:
            self._worker_left(worker, "cancelled")

    def process_ended(self, peer: str) -> None:
        """The process behind the peer is gone."""
        self.left(peer)
        self._disk.process_ended(peer)
        self._executor_ended(peer)
        for worker in [w for w in self._state.workers.values() if w.peer == peer]:
            del self._state.workers[worker.name]
        self._state.pids.pop(peer, None)

    def copies_ended(self, jobs: list[str], peer: str) -> None:
        """A worker proves that no copy of these jobs of its own runs or will run."""
        for job_id in jobs:
            job = self._copies.get(job_id)
            if job is not None and job.worker.mode == "worker" and job.worker.peer == peer:
                self._abandon(job, "copy_failed", "the worker lost its GPU service")
                self._proven_quiet(job)

    def _executor_ended(self, peer: str) -> None:
        """No copy that this peer's process ran for it is under way any more."""
        for job in self._copies.all():
            if job.executor == peer:
                self._proven_quiet(job)

    def _proven_quiet(self, job: CopyJob) -> None:
        if isinstance(job, ParkJob):
            self._parks.proven_quiet(job)
        else:
            self._copies.proven_quiet(job)

    def worker(self, name: str, peer: str) -> Worker:
        """The worker that attached as this peer. Raises ProtocolError when there is none of that name."""
        worker = self._state.workers.get(name)
        if worker is None or not worker.connected or worker.peer != peer:
            raise ProtocolError(f"worker '{name}' is not attached", fix="attach again")
        return worker

    def _worker_left(self, worker: Worker, reason: Reason) -> None:
        if not worker.connected:
            return
        worker.connected = False
        for job in self._jobs_of(worker):
            self._abandon(job, reason, "the worker went away")
        self._plans.worker_left(worker)
        if self._state.gpu_peer:
            self._state.send(self._state.gpu_peer, PoolLeft(worker=worker.name))

    def _gpu_left(self, peer: str) -> None:
        self._state.gpu_peer, self._state.gpu_said = "", GpuUsage()
        for job in self._copies.all():
            if job.running:
                self._abandon(job, "copy_failed", "the GPU service went away")

    def _jobs_of(self, worker: Worker) -> list[CopyJob]:
        return [job for job in self._copies.all() if job.worker is worker]

    def _abandon(self, job: CopyJob, reason: Reason, detail: str) -> None:
        if job.over:
            return
        if isinstance(job, ParkJob):
            self._parks.abandon(job, reason, detail)
        elif isinstance(job, RestoreJob):
            self._restores.abandon(job, reason, detail)


def _check_attach(message: Attach) -> None:
    if len(message.fingerprint) != KEY_BYTES:
        raise FingerprintError(
            f"a fingerprint has {KEY_BYTES} bytes, this has {len(message.fingerprint)}",
            fix="attach with Fingerprint.of_directory(...) or Fingerprint.of_revision(...)",
        )
    geometry = message.geometry
    if all(group.empty for group in geometry.groups) or not message.shard:
        raise GeometryError("the pool names no layer group or no shard", fix="attach with its geometry")
    if geometry.block_tokens < 1 or geometry.page_tokens < 1 or geometry.block_tokens % geometry.page_tokens:
        raise GeometryError(
            f"block_tokens {geometry.block_tokens} is not a multiple of page_tokens {geometry.page_tokens}",
            fix="choose block_tokens as a multiple of the engine's page",
        )
    for group in geometry.groups:
        # A window of one token needs no token before it, so there would be nothing to keep of it.
        windowless = group.kind == "sliding" and group.window_tokens < 2
        negative = min(group.token_bytes, group.state_bytes, group.lossy_token_bytes) < 0
        if windowless or negative or (not group.empty and group.object_bytes(1) < 1):
            raise GeometryError(f"a {group.kind} layer group has no size or window", fix="check the pool")


def _check_same(message: Attach, worker: Worker) -> None:
    """Workers of one model and shard have objects of one size, or they could not share them."""
    same = (message.fingerprint, message.shard) == (worker.fingerprint, worker.shard)
    mine, theirs = message.geometry, worker.geometry
    if same and mine.block_tokens == theirs.block_tokens and mine.groups != theirs.groups:
        raise GeometryError(
            f"{worker.name} has other layer groups for shard {message.shard} of this model",
            fix="give models that differ in their KV layout another fingerprint",
        )
