"""The core of a node: stimuli in, instructions out. No I/O, no clock, no threads, no Ray.

    core = NodeCore(settings, host, policies, secret, rng, epoch=..., arena_bytes=..., generation_slots=...)
    for send in core.handle(now_s, Received("client:1", message)):
        ...

The daemon, the simulator and the tests drive the same object.  Given the same stimuli at the same times it
gives the same instructions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from kvtier.errors import ConfigError, KvtierError, ProtocolError
from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.node import usage
from kvtier.node.admin import Admin
from kvtier.node.adoption import Adoption
from kvtier.node.choosing import Chooser
from kvtier.node.cluster_side import CLUSTER_SAYS, ClusterSide
from kvtier.node.copies import Copies
from kvtier.node.disk_side import DiskSide
from kvtier.node.elsewhere import Elsewhere
from kvtier.node.events import (
    ArenaGrew,
    EventsJoined,
    Left,
    ProcessEnded,
    Received,
    Remembered,
    Send,
    Stimulus,
    Tick,
)
from kvtier.node.host_memory import HostMemory
from kvtier.node.limits import check_names
from kvtier.node.loads import Loads
from kvtier.node.locating import Locating
from kvtier.node.park_job import ParkJob
from kvtier.node.parks import Parks
from kvtier.node.peers import Peers
from kvtier.node.plans import Plans
from kvtier.node.prefetch import Prefetch
from kvtier.node.queues import Queues
from kvtier.node.replicas import Replicas
from kvtier.node.reports import status_report
from kvtier.node.restore_job import RestoreJob
from kvtier.node.restores import Restores
from kvtier.node.room import Room
from kvtier.node.settings import NodeSettings
from kvtier.node.spills import Spills
from kvtier.node.state import NodeState
from kvtier.policy.interfaces import Policies
from kvtier.receipts import StatusReport
from kvtier.tier import Slot

# After these nothing can have ended, so nobody who waits needs another look.
_QUESTIONS = (
    m.Ping,
    m.Status,
    m.ListConversations,
    m.Show,
    m.Explain,
    m.ListModels,
    m.Locate,
    m.Hint,
    m.Prefilled,
)


# Who may send what: the beginning of the peer's name.
_SERVICES_SAY: dict[type[m.Message], tuple[str, ...]] = {
    t.TierHello: ("disk", "gpu"),
    t.Copied: ("gpu",),
    t.GpuUsage: ("gpu",),
    t.Announce: ("disk",),
    t.DiskWritten: ("disk",),
    t.DiskReadDone: ("disk",),
    t.DiskRemoved: ("disk",),
    t.DiskUsage: ("disk",),
    **CLUSTER_SAYS,
}


class NodeCore:
    """One node. arena_bytes, generation_slots: what attachers are told of host memory."""

    def __init__(
        self,
        settings: NodeSettings,
        host: HostMemory,
        policies: Policies,
        secret: bytes,
        rng: random.Random,
        *,
        epoch: int,
        arena_bytes: list[int],
        generation_slots: int,
    ) -> None:
        self.state = state = NodeState(settings, host, policies, secret, rng)
        state.epoch = epoch
        state.arena_bytes = arena_bytes
        self._arena = (arena_bytes, generation_slots)
        self._grown_bytes = [0] * len(arena_bytes)
        self._copies = Copies(state)
        self._disk = DiskSide(state)
        self._spills = Spills(state, self._disk)
        room = Room(state, self._disk, self._spills)
        self._prefetch = Prefetch(state, self._disk, room)
        replicas = Replicas(state)
        self._parks = Parks(state, self._copies, self._disk, room, replicas)
        queues = Queues(self._copies, self._disk)
        chooser = Chooser(state, queues)
        self._loads = Loads(state, queues)
        elsewhere = Elsewhere(state, self._loads)
        self.cluster = ClusterSide(state, self._disk, room, elsewhere, self._loads, replicas)
        self._plans = Plans(state, self._parks, elsewhere, chooser)
        self._restores = Restores(state, self._copies, self._disk, room, self._plans, self.cluster.pulls)
        self._adoption = Adoption(state, self._disk)
        self._peers = Peers(
            state, self._copies, self._disk, self._adoption, self._parks, self._plans, self._restores
        )
        self._served = usage.Served(state)
        self._admin = Admin(state, self._disk, self._parks, self.cluster.burials, self.cluster.everywhere)
        self._locating = Locating(
            state,
            elsewhere,
            self.cluster.everywhere,
            self._plans,
            self._loads,
            self._admin.located_here,
        )
        self._handlers = self._make_handlers()

    def handle(self, now_s: float, stimulus: Stimulus) -> list[Send]:
        """What is to be sent because of this. now_s: Unix seconds that never go back."""
        state = self.state
        state.now_s = max(now_s, state.now_s)
        if state.started_s is None:
            state.started_s = state.now_s
        state.out = []
        self._pass_time()
        if isinstance(stimulus, Received):
            self._received(stimulus)
        elif isinstance(stimulus, Left):
            self._peers.left(stimulus.peer)
        elif isinstance(stimulus, ProcessEnded):
            self._peers.process_ended(stimulus.peer)
        elif isinstance(stimulus, EventsJoined):
            if stimulus.worker in state.workers:
                state.workers[stimulus.worker].pid = stimulus.pid
        elif isinstance(stimulus, ArenaGrew):
            self._arena_grew(stimulus)
        elif isinstance(stimulus, Remembered):
            self._take_over(stimulus)
        elif isinstance(stimulus, Tick):
            self._tick()
        if not isinstance(stimulus, EventsJoined) and not self._was_question(stimulus):
            # Somebody waits for a restore: it is asked for, and finds room, first.
            self._restores.advance_all()
            self._parks.advance_all()
            self.cluster.keeping.advance_all()
            self._plans.advance_all()
            self._disk.tidy_records()
            self._spills.ahead()
            self._prefetch.advance()
        return state.out

    def busy(self) -> bool:
        """Whether anything is under way that time can end."""
        wishes = bool(self._disk.dues.wishes) and self._disk.usable()
        return wishes or bool(self._copies.all()) or self.state.next_end_s() is not None

    def has_more(self) -> bool:
        """Whether another tick is wanted at once: a long piece of work is done in parts."""
        return self._adoption.under_way

    def learned(self) -> dict[str, bytes]:
        """What the policies have learned, by name; the next core goes on from it. See events.Remembered."""
        return {name: policy.to_bytes() for name, policy in self.state.policies.learned.items()}

    def status(self) -> StatusReport:
        """The node at this instant."""
        return status_report(self.state, self._parks.waiting())

    # --- messages ---------------------------------------------------------------------------------------

    def _received(self, stimulus: Received) -> None:
        """A caller's mistake is answered by Failed, and has changed nothing."""
        kind = type(stimulus.message)
        handler = self._handlers.get(kind)
        try:
            if handler is None or (
                kind in _SERVICES_SAY and not stimulus.peer.startswith(_SERVICES_SAY[kind])
            ):
                raise ProtocolError(f"a node does not take {type(stimulus.message).__name__} messages")
            check_names(stimulus.message)
            handler(stimulus.peer, stimulus.message)
        except KvtierError as error:
            self.state.refuse(stimulus.peer, stimulus.message, error)

    def _make_handlers(self) -> dict[type[m.Message], Callable[[str, Any], None]]:
        peers, admin, disk = self._peers, self._admin, self._disk
        return {
            m.Ping: lambda peer, msg: self.state.send(peer, m.Pong(id=msg.id)),
            m.Attach: lambda peer, msg: peers.attach(peer, msg, *self._arena),
            m.Detach: self._detach,
            m.Park: lambda peer, msg: self._parks.start(peer, msg, peers.worker(msg.worker, peer)),
            m.MakePlan: self._make_plan,
            m.Restore: lambda peer, msg: self._restores.start(peer, msg, peers.worker(msg.worker, peer)),
            m.JoinPlan: lambda peer, msg: self._plans.join(peer, msg, peers.worker(msg.worker, peer)),
            m.Prefilled: peers.prefilled,
            m.DropPlan: self._drop_plan,
            m.CopiesEnded: self._copies_ended,
            m.Status: admin.status,
            m.ListConversations: admin.list_conversations,
            m.Show: admin.show,
            m.Explain: admin.explain,
            m.ListModels: admin.models,
            m.Retire: admin.retire,
            m.Hint: admin.hint,
            m.Locate: self._locating.locate,
            m.Forget: admin.forget,
            t.TierHello: self._service_joined,
            t.Copied: self._copied,
            t.GpuUsage: self._peers.gpu_usage,
            t.Announce: self._adoption.on_announce,
            t.DiskWritten: disk.on_written,
            t.DiskReadDone: disk.reads.on_read,
            t.DiskRemoved: lambda peer, msg: disk.on_removed(msg),
            t.DiskUsage: disk.on_usage,
            **self.cluster.handlers(),
        }

    def _detach(self, peer: str, message: m.Detach) -> None:
        self._peers.detach(message.worker, peer)
        self.state.send(peer, m.Done(id=message.id))

    def _make_plan(self, peer: str, message: m.MakePlan) -> None:
        worker = self._peers.worker(message.worker, peer)
        self._plans.make(peer, message, worker)
        self._loads.asked(worker, message)
        usage.asked(self.state, message)

    def _drop_plan(self, peer: str, message: m.DropPlan) -> None:
        self._plans.drop(message.plan_id)
        self.state.send(peer, m.Done(id=message.id))

    def _copies_ended(self, peer: str, message: m.CopiesEnded) -> None:
        self._peers.copies_ended(message.jobs, peer)
        self.state.send(peer, m.Done(id=message.id))

    def _service_joined(self, peer: str, message: t.TierHello) -> None:
        self.state.pids[peer] = message.pid
        self._peers.service_joined(peer, message, *self._arena)

    def _copied(self, peer: str, message: t.Copied) -> None:
        ended = self._copies.ended(message)
        if ended is None:
            return
        job, pairs = ended
        if isinstance(job, ParkJob):
            self._parks.copied(job, pairs, message)
        elif isinstance(job, RestoreJob):
            self._restores.copied(job, pairs, message)

    def _take_over(self, stimulus: Remembered) -> None:
        """What is damaged is learned anew."""
        for name, policy in self.state.policies.learned.items():
            if name not in stimulus.sections:
                continue
            try:
                policy.take_over(stimulus.sections[name])
            except ConfigError as error:
                self.state.unlearned.append(f"what was learned of {name} is lost: {error}")

    # --- time and memory --------------------------------------------------------------------------------

    def _pass_time(self) -> None:
        disk = self.state.disk
        free_bytes = disk.capacity_bytes - self.state.disk_held_bytes
        self.state.policies.usage.passed(self.state.now_s, self._disk.usable(), free_bytes)
        self._served.look()

    def _arena_grew(self, stimulus: ArenaGrew) -> None:
        self.state.host.grow(stimulus.sub_arena, stimulus.ready_bytes)
        self._grown_bytes[stimulus.sub_arena] = stimulus.ready_bytes
        self.state.faulted_in_bytes = sum(self._grown_bytes)

    def _tick(self) -> None:
        self._adoption.go_on()
        for slot, holder in self.state.host.expire(self.state.now_s):
            self._expired(slot, holder)
        self._plans.tick()
        self._parks.tick()
        self._restores.tick()
        self._admin.tick()
        self._disk.tick()
        self.cluster.tick()
        self._prefetch.tick()

    def _expired(self, slot: Slot, holder: str) -> None:
        """A right ended. Whoever cannot be touching the slot is taken out at once; the rest is in limbo."""
        if holder.startswith("r"):
            self._disk.reads.expired(holder)
            return
        if holder.startswith("x"):
            self.cluster.pulls.reads.expired(holder)
            return
        job = self._copies.get(holder)
        filling = job is not None and any(slot == s for pairs in job.running.values() for _, s in pairs)
        if isinstance(job, RestoreJob):
            self._restores.abandon(job, "lease_expired", "the copy took longer than it had")
        elif isinstance(job, ParkJob) and filling:
            self._parks.expired(job)
        if not filling and not holder.startswith(("w", "l")):
            self.state.host.release(slot, holder)

    @staticmethod
    def _was_question(stimulus: Stimulus) -> bool:
        return isinstance(stimulus, Received) and isinstance(stimulus.message, _QUESTIONS)
