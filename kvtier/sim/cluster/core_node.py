"""A node whose tiers are decided by the daemon's own core, block by block, in virtual time.

Workers ask the core as real ones do (MakePlan, Restore, Park), and what it sends to its GPU and disk services
is answered after the time that the links and the drive need.  Only the bytes are missing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Final

from kvtier.config.schema import Config
from kvtier.errors import ConfigError, KvtierError
from kvtier.geometry import Geometry, GroupGeometry
from kvtier.host.slots import HostSlots
from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.model.config_json import load_config
from kvtier.node.core import NodeCore
from kvtier.node.events import ArenaGrew, EventsJoined, Received, Send, Stimulus, Tick
from kvtier.node.settings import NodeSettings
from kvtier.receipts import Plan, RestoreReceipt
from kvtier.sim.cluster.core_disk import SimulatedDisk
from kvtier.sim.cluster.core_services import CoreServices, Lines
from kvtier.sim.cluster.core_text import packed_text
from kvtier.sim.cluster.costs import ServingCost
from kvtier.sim.cluster.deciders import NONE, capacity_of, policies_of
from kvtier.sim.cluster.engine import Engine
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.job import Job
from kvtier.sim.cluster.models import MODELS
from kvtier.sim.cluster.node import Kept, Node
from kvtier.sim.cluster.scenario import Scenario

SECRET: Final = b"the secret of a simulated cluster"
_MODEL: Final = b"simulated model".ljust(32, b".")
_GPU, _DISK = "gpu:1", "disk:1"
# The daemon's loop looks at leases and deadlines about so often.
_TICK_S = 0.25
# So often it is looked who is expected back, up to so long after the last request.
_LOOK_S, _LOOKS_S = 15.0, 3600.0
_LONGEST_PARK_S = 600.0
_MOST_ARENA_BYTES = 1 << 44
_SLOTS = 1 << 22


class CoreNode(Node):
    """See Node. Conversations are not fetched from peers."""

    def __init__(
        self,
        scenario: Scenario,
        policy: str,
        cost: ServingCost,
        events: Events,
        first_token: Callable[[Job, float], None],
        ended: Callable[[Job], None],
        block_tokens: int,
    ) -> None:

        def prefilled(job: Job, seconds: float) -> None:
            first_token(job, seconds)
            self._tell_prefill(job, seconds)

        super().__init__(scenario, cost, events, prefilled, ended)
        if policy.startswith(NONE):
            raise ConfigError(
                "policies", f"'{policy}' has no core to drive", fix="compare it with fidelity 'fast'"
            )
        if scenario.nodes.peer_bytes_per_s:
            raise ConfigError("nodes.peer_bytes_per_s", "needs fidelity 'fast'")
        host_bytes = min(capacity_of(policy, scenario.host.capacity_bytes), _MOST_ARENA_BYTES)
        host_bytes -= host_bytes % (1 << 12)
        disk_bytes = min(capacity_of(policy, scenario.disk.capacity_bytes), _MOST_ARENA_BYTES)
        self._disk = SimulatedDisk(disk_bytes, self.drive)
        self._block_tokens = block_tokens
        self.core = NodeCore(
            _settings(disk_expected=bool(disk_bytes)),
            HostSlots([host_bytes], ready_bytes=[0], max_slots=_SLOTS, first_generation=1),
            policies_of(policy),
            SECRET,
            random.Random(scenario.seed),
            epoch=1,
            arena_bytes=[host_bytes],
            generation_slots=_SLOTS,
        )
        self._serial = 0
        self._ticking = self._looking = False
        self._look_until_s = 0.0
        # Requests to the core that are not answered yet, and jobs that wait for an event, by number.
        self._asked: dict[int, Callable[[m.Message], None]] = {}
        self._restoring: dict[int, tuple[Job, Engine, Plan, float]] = {}
        # Workers of the rows that wait for their prefill, and rows that were planned behind others.
        self._serving: dict[int, Engine] = {}
        self._behind: set[int] = set()
        self._lines: dict[str, Lines] = {}
        self._services = CoreServices(events, self._tell, self._disk, self._lines.__getitem__)
        self._names: dict[int, str] = {}
        self._held_s = 0.0
        self._parked: dict[int, int] = {}
        self._kept = Kept()
        self._start(host_bytes, disk_bytes)

    def _start(self, host_bytes: int, disk_bytes: int) -> None:
        self._tell(ArenaGrew(0, host_bytes))
        self._tell(Received(_GPU, t.TierHello(pid=1, address="simulated")))
        if disk_bytes:
            self._tell(Received(_DISK, t.TierHello(pid=2, capacity_bytes=disk_bytes)))
            self._tell(Received(_DISK, self._disk.usage()))
            self._tell(Received(_DISK, t.Announce(last=True)))
        token_bytes = int(self._cost.token_bytes)
        geometry = Geometry(self._block_tokens, self._block_tokens, (GroupGeometry("full", token_bytes),))
        model, worker = self._scenario.model, self._scenario.worker
        attach = m.Attach(
            fingerprint=_MODEL,
            model="simulated",
            geometry=geometry,
            shard="s0",
            layout="simulated",
            config=load_config(model.config or MODELS[model.name])[0],
            device=worker.device,
            devices=worker.gpus,
        )
        for engine in self.engines:
            self._ask(self._peer(engine), attach, partial(self._attached, engine))

    def _attached(self, engine: Engine, answer: m.Message) -> None:
        assert isinstance(answer, m.Attached), f"a simulated worker was refused: {answer}"
        self._lines[answer.worker] = Lines(engine.to_gpu, engine.from_gpu)
        self._names[id(engine)] = answer.worker
        self._tell(EventsJoined(answer.worker))

    # --- requests ---------------------------------------------------------------------------------------

    def take(self, job: Job, home: Node | None) -> None:
        """See Node."""
        engine = self._engine(job)
        job.past = job.gpu_tokens = engine.idle_tokens(job)
        engine.expect(job)
        now_s = self._events.now_s
        if self.core.state.settings.prefetch_s:
            self._look_until_s = now_s + _LOOKS_S
        self._serving[job.row] = engine
        if engine.to_gpu.queued_bytes(now_s) or self.drive.queued_bytes(now_s):
            self._behind.add(job.row)
        plan = m.MakePlan(
            worker=self._names[id(engine)],
            conversation=_name(job),
            tenant=str(job.turn.tenant),
            tokens=packed_text(job, job.turn.tokens_in),
            lease_s=self._scenario.deadline_s,
            deadline_s=self._scenario.deadline_s,
            waiting=engine.waiting,
            prefill_wait_s=engine.backlog_s(now_s),
        )
        self._ask(self._peer(engine), plan, lambda answer: self._planned(answer, job, engine))

    def _planned(self, answer: m.Message, job: Job, engine: Engine) -> None:
        assert isinstance(answer, m.Planned), f"a simulated plan was refused: {answer}"
        plan = answer.plan
        if min(plan.load_tokens, job.usable) <= job.past:
            self._behind.discard(job.row)
            if plan.plan_id:
                self._ask(self._peer(engine), m.DropPlan(plan_id=plan.plan_id), _nothing)
            engine.ready(job)
            return
        self._serial += 1
        self._restoring[self._serial] = (job, engine, plan, self._events.now_s)
        restore = m.Restore(
            worker=self._names[id(engine)],
            request=self._serial,
            plan_id=plan.plan_id,
            deadline_s=self._scenario.deadline_s,
        )
        number = self._serial
        self._ask(self._peer(engine), restore, lambda answer: self._begun(answer, number))

    def _begun(self, answer: m.Message, number: int) -> None:
        if isinstance(answer, m.RestoreStarted) and answer.receipt is not None:
            self._restored(number, answer.receipt)
        elif isinstance(answer, m.Failed):
            job, engine, _, _ = self._restoring.pop(number)
            engine.ready(job)

    def _restored(self, number: int, receipt: RestoreReceipt) -> None:
        job, engine, plan, asked_s = self._restoring.pop(number)
        source = "disk" if receipt.sources.get("disk") else "host"
        behind = job.row in self._behind
        self._behind.discard(job.row)
        self.forecasts.see(plan.eta_s, source, self._events.now_s - asked_s, loaded=behind)
        job.late = receipt.reason == "deadline"
        got = min(receipt.tokens, job.usable)
        if got > job.past:
            from_disk = min(receipt.sources.get("disk", 0), got - job.past)
            job.disk_tokens, job.host_tokens = from_disk, got - job.past - from_disk
            job.past = got
        engine.ready(job)

    def _tell_prefill(self, job: Job, seconds: float) -> None:
        """As a worker does after each prefill."""
        engine = self._serving.pop(job.row)
        told = m.Prefilled(
            worker=self._names[id(engine)],
            past=job.past,
            tokens=job.turn.tokens_in - job.past,
            seconds=seconds,
        )
        self._ask(self._peer(engine), told, _nothing)

    def _park(self, job: Job, engine: Engine) -> None:
        if job.last is None:
            return
        self._serial += 1
        park = m.Park(
            worker=self._names[id(engine)],
            request=self._serial,
            conversation=_name(job),
            tenant=str(job.turn.tenant),
            tokens=packed_text(job, job.last.end),
            held_from=[0],
            level=self._scenario.level,
            timeout_s=_LONGEST_PARK_S,
            stop=job.turn.stop,
        )
        self._parked[job.turn.tenant] = self._parked.get(job.turn.tenant, 0) + job.last.end
        self._ask(self._peer(engine), park, _nothing)

    def kept(self) -> Kept:
        """See Kept. What is held is shared out by the tokens that each tenant parked."""
        self._hold()
        total = sum(self._parked.values()) or 1
        shares = {tenant: tokens / total for tenant, tokens in sorted(self._parked.items())}
        whole = self._kept
        return Kept(
            self.core.state.counters.evicted_objects,
            {int(tenant): float(nbytes) for tenant, nbytes in sorted(self._disk.written.items())},
            {tenant: share * whole.host_byte_s.get(-1, 0.0) for tenant, share in shares.items()},
            {tenant: share * whole.disk_byte_s.get(-1, 0.0) for tenant, share in shares.items()},
        )

    # --- the core and its services ----------------------------------------------------------------------

    def _peer(self, engine: Engine) -> str:
        return f"client:{self.engines.index(engine) + 1}"

    def _ask(self, peer: str, message: m.Message, then: Callable[[m.Message], None]) -> None:
        self._serial += 1
        self._asked[self._serial] = then
        self._tell(Received(peer, _numbered(message, self._serial)))

    def _tell(self, stimulus: Stimulus) -> None:
        self._hold()
        for send in self.core.handle(self._events.now_s, stimulus):
            self._arrive(send)
        if not self._ticking and (self._asked or self._restoring or self.core.busy()):
            self._ticking = True
            self._events.at(self._events.now_s + _TICK_S, self._tick, None)
        if not self._looking and self._events.now_s < self._look_until_s:
            self._looking = True
            self._events.at(self._events.now_s + _LOOK_S, self._look, None)

    def _tick(self, _: None) -> None:
        self._ticking = False
        self._tell(Tick())

    def _look(self, _: None) -> None:
        self._looking = False
        self._tell(Tick())

    def _hold(self) -> None:
        now_s = self._events.now_s
        kept, seconds = self._kept, now_s - self._held_s
        if seconds > 0:
            self._held_s = now_s
            host = self.core.state.host.usage().used_bytes
            kept.host_byte_s[-1] = kept.host_byte_s.get(-1, 0.0) + seconds * host
            kept.disk_byte_s[-1] = kept.disk_byte_s.get(-1, 0.0) + seconds * self._disk.used_bytes

    def _arrive(self, send: Send) -> None:
        message = send.message
        if self._services.take(send):
            return
        if isinstance(message, m.RestoreDone):
            self._restored(message.request, message.receipt)
        elif send.peer.startswith("client") and message.id in self._asked:
            self._asked.pop(message.id)(message)


def _settings(*, disk_expected: bool) -> NodeSettings:
    """Those that a daemon has whose configuration says nothing."""
    config = Config()
    return NodeSettings(
        batch_bytes=config.gpu.batch_bytes,
        batches_in_flight=config.gpu.batches_in_flight,
        plan_lease_s=config.leases.plan_s,
        copy_lease_s=config.leases.copy_s,
        verify=config.host.verify == "always",
        disk_expected=disk_expected,
        spill_above=config.host.spill_above,
        prefetch_s=config.policy.prefetch_s,
    )


def _name(job: Job) -> str:
    turn = job.turn
    return f"{turn.conversation}" if turn.conversation >= 0 else f"row {job.row}"


def _numbered(message: m.Message, number: int) -> m.Message:
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    return type(message)(**values | {"id": number})


def _nothing(answer: m.Message) -> None:
    """A caller's mistake would be one of the simulator's."""
    if isinstance(answer, m.Failed):
        raise KvtierError(f"the core refused the simulator: {answer.error}: {answer.message}")
