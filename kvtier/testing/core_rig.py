"""A node's core in a world of its own: workers, GPU service, disk service and time, all under a test's hand.

    rig = CoreRig()
    worker = rig.attach()
    park = rig.park(worker, "chat", range(10), level="disk")
    rig.run()                                   # every copy and every disk job, until nothing is left
    assert park.receipt.level == "disk"
    restore = rig.resume(worker, "chat", range(12))
    assert restore.receipt.tokens == 10

Copies and disk jobs wait in `rig.ops` until they are begun, finished, failed or lost, in any order.  What
must never happen is collected in `rig.violations` whenever it does.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from kvtier.geometry import Geometry
from kvtier.host.slots import HostSlots
from kvtier.keys import pack_tokens
from kvtier.messages import calls as m
from kvtier.node.blocks import Stored
from kvtier.node.core import NodeCore
from kvtier.node.events import ArenaGrew, Received, Send, Stimulus, Tick
from kvtier.node.settings import NodeSettings
from kvtier.policy.defaults import make_policies
from kvtier.policy.prices import Money
from kvtier.receipts import AskedLevel, ParkReceipt, RestoreReceipt
from kvtier.testing.rig_ops import Op
from kvtier.testing.rig_services import RigServices
from kvtier.testing.rig_uses import PLAIN, UNIT, RigPark, RigRestore, RigWorker
from kvtier.testing.rig_world import DiskStore, Pages, Text

SECRET = b"a secret of the cluster, 32 bytes"
MODEL = b"m" * 32
_NO_MONEY = Money()


class CoreRig(RigServices):
    """See the module's text.

    disk: bytes that it may hold, a store to go on with, or None for a node without one.  started: whether
    the services are there from the beginning.  stimuli: all that the core was told, with the times.
    """

    def __init__(
        self,
        *,
        arena_bytes: Sequence[int] = (64 * UNIT,),
        disk: DiskStore | int | None = 1 << 20,
        settings: NodeSettings | None = None,
        core: type[NodeCore] = NodeCore,
        epoch: int = 1,
        started: bool = True,
        eviction: str = "lru",
        money: Money = _NO_MONEY,
    ) -> None:
        self.now_s = 1000.0
        self.eviction = eviction
        generations: dict[int, int] = {}
        host = HostSlots(arena_bytes, first_generation=epoch, publish=generations.__setitem__)
        super().__init__(host, generations, DiskStore(disk) if isinstance(disk, int) else disk)
        base = settings or NodeSettings(
            batch_bytes=2 * UNIT, batches_in_flight=2, disk_expected=disk is not None
        )
        self.settings = base
        self.stimuli: list[tuple[float, Stimulus]] = []
        self.core = core(
            base,
            self.host,
            make_policies(eviction, money=money),
            SECRET,
            random.Random(epoch),
            epoch=epoch,
            arena_bytes=list(arena_bytes),
            generation_slots=1024,
        )
        self.answers: dict[int, list[m.Message]] = {}
        self.askers: dict[int, str] = {}
        self._asked: dict[int, Any] = {}
        for index, size in enumerate(arena_bytes):
            self.tell(ArenaGrew(index, size))
        if started:
            self.start_gpu()
            if self.store is not None:
                self.start_disk()

    def remove_from_disk(self, objects: Iterable[Stored]) -> None:
        """Have the core remove copies from the disk, for no reason of its own."""
        self.core.state.out = []
        self.core._disk.remove(objects)
        for send in self.core.state.out:
            self._arrive(send)

    # --- time and messages ------------------------------------------------------------------------------

    def tell(self, stimulus: Stimulus) -> None:
        """Give the core a stimulus, and let its messages arrive."""
        self.stimuli.append((self.now_s, stimulus))
        for send in self.handle(stimulus):
            self._arrive(send)
        self._check_rooms()

    def handle(self, stimulus: Stimulus) -> list[Send]:
        """The core's answer."""
        return self.core.handle(self.now_s, stimulus)

    def tick(self, seconds: float = 0.0) -> None:
        """Time passes."""
        self.now_s += seconds
        self.tell(Tick())

    def ask(self, message: m.Message, peer: str = "client:0") -> Any:
        """Send a request; answers its answer, or None when that has not come yet."""
        request_id = self._next()
        self.answers[request_id] = []
        self.askers[request_id] = peer
        self.tell(Received(peer, msgspec.structs.replace(message, id=request_id)))
        answers = self.answers[request_id]
        return answers[0] if answers else None

    def _arrive(self, send: Send) -> None:
        message = send.message
        if send.peer.startswith("worker:"):
            self._event(send.peer, message)
        elif send.peer.startswith("gpu"):
            self._at_gpu(send.peer, message)
        elif send.peer.startswith("disk"):
            self._at_disk(send.peer, message)
        else:
            self._answer(message)

    def _answer(self, message: m.Message) -> None:
        answers = self.answers.setdefault(message.id, [])
        answers.append(message)
        if len(answers) > 1:
            self.violations.append(f"request {message.id} was answered twice: {answers}")
        use = self._asked.get(message.id)
        if isinstance(message, m.Failed) and isinstance(use, RigPark | RigRestore):
            use.failed = message
            self.requests.pop(use.message.request, None)
        elif isinstance(message, m.ParkStarted | m.RestoreStarted) and use is not None:
            use.job = message.job
            if message.receipt is not None:
                use.receipts.append(message.receipt)
        elif isinstance(message, m.Attached) and use is not None:
            use.name = message.worker

    # --- workers ----------------------------------------------------------------------------------------

    def attach(
        self,
        geometry: Geometry = PLAIN,
        *,
        fingerprint: bytes = MODEL,
        shard: str = "s0",
        mode: m.Mode = "worker",
        **shown: Any,
    ) -> RigWorker:
        """A worker in a process of its own. shown: of what it computes with, as in m.Attach."""
        proc = self._proc("client")
        worker = RigWorker(proc, geometry, fingerprint, shard, mode)
        self._asked[self._serial + 1] = worker
        message = m.Attach(
            fingerprint=fingerprint,
            model="model",
            geometry=geometry,
            shard=shard,
            layout="l",
            mode=mode,
            **shown,
        )
        self.ask(message, proc.peer)
        self.workers.append(worker)
        return worker

    def text(
        self, worker: RigWorker, name: str, tokens: Iterable[int], tenant: str, private_from: int | None
    ) -> Text:
        """The tokens as this worker computes them in this conversation."""
        return Text(worker.fingerprint, tenant, worker.shard, name, tuple(tokens), private_from)

    def park(
        self,
        worker: RigWorker,
        name: str,
        tokens: Iterable[int],
        *,
        tenant: str = "acme",
        level: AskedLevel = "host",
        private_from: int | None = None,
        after: m.Planned | None = None,
        held_from: Sequence[int] = (),
        timeout_s: float = 30.0,
        **wishes: Any,
    ) -> RigPark:
        """Ask for a park; its copies wait in `ops`. tokens: all of them, also with `after`."""
        text = self.text(worker, name, tokens, tenant, private_from)
        front = after.front_tokens if after else 0
        message = m.Park(
            worker=worker.name,
            request=self._next(),
            conversation=name,
            tenant=tenant,
            tokens=pack_tokens(text.tokens[front:]),
            after_key=after.front_key if after else b"",
            after_tokens=front,
            held_from=list(held_from),
            level=level,
            share="prefix" if private_from is None else "conversation",
            private_from=private_from or 0,
            timeout_s=timeout_s,
            pages=_pages(worker, len(text.tokens)),
            **wishes,
        )
        park = RigPark(worker, message, Pages(text, worker.geometry))
        park.pages.fill(held_from)
        self._use(park)
        return park

    def plan(
        self,
        worker: RigWorker,
        name: str,
        tokens: Iterable[int],
        *,
        tenant: str = "acme",
        lease_s: float = 10.0,
        after: m.Planned | None = None,
        **wishes: Any,
    ) -> Any:
        """Planned, Failed, or None while a park of the conversation is waited for. wishes: see m.MakePlan."""
        front = after.front_tokens if after else 0
        return self.ask(
            m.MakePlan(
                worker=worker.name,
                conversation=name,
                tenant=tenant,
                tokens=pack_tokens(list(tokens)[front:]),
                after_key=after.front_key if after else b"",
                after_tokens=front,
                lease_s=lease_s,
                **wishes,
            ),
            worker.peer,
        )

    def restore(
        self, worker: RigWorker, planned: m.Planned, tokens: Iterable[int], *, deadline_s: float = 20.0
    ) -> RigRestore:
        """Carry out a plan into fresh pages; its reads and copies wait in `ops`. tokens: as planned."""
        plan = planned.plan
        text = self.text(worker, plan.conversation, tokens, plan.tenant, None)
        message = m.Restore(
            worker=worker.name,
            request=self._next(),
            plan_id=plan.plan_id,
            deadline_s=deadline_s,
            pages=_pages(worker, plan.load_tokens),
        )
        restore = RigRestore(worker, message, Pages(text, worker.geometry), planned)
        self._use(restore)
        return restore

    def resume(self, worker: RigWorker, name: str, tokens: Iterable[int], **how: Any) -> RigRestore:
        """Plan, restore and run."""
        tokens = list(tokens)
        restore = self.restore(worker, self.plan(worker, name, tokens, **how), tokens)
        self.run()
        return restore

    def _use(self, use: RigPark | RigRestore) -> None:
        self.requests[use.message.request] = use
        self._asked[self._serial + 1] = use
        self.ask(use.message, use.worker.peer)

    def _event(self, worker: str, message: m.Message) -> None:
        use = self.requests.get(getattr(message, "request", -1))
        if use is None or use.worker.name != worker:
            self.violations.append(f"{worker} was told {message} about nothing")
        elif isinstance(message, m.Released) and isinstance(use, RigPark):
            use.released = True
            self._check_released(use)
        elif isinstance(message, m.ParkDone) and isinstance(use, RigPark):
            use.receipts.append(message.receipt)
            self._check_park(use, message.receipt)
        elif isinstance(message, m.RestoreDone) and isinstance(use, RigRestore):
            use.receipts.append(message.receipt)
            self._check_restore(use, message.receipt)

    def restarted(self, **how: Any) -> CoreRig:
        """The node after power loss: everything is gone but what is durable."""
        store = self.store.copy() if self.store is not None else None
        arenas = [arena.capacity_bytes for arena in self.host._arenas]
        epoch = self.core.state.epoch + 1
        how.setdefault("eviction", self.eviction)
        return CoreRig(arena_bytes=arenas, disk=store, settings=self.settings, epoch=epoch, **how)

    # --- what must hold ---------------------------------------------------------------------------------

    def _running(self, use: RigPark | RigRestore) -> list[Op]:
        return [op for op in self.copies() if op.message.request == use.message.request]

    def _check_released(self, park: RigPark) -> None:
        if self._running(park):
            self.violations.append(f"released although {self._running(park)} may run")

    def _check_park(self, park: RigPark, receipt: ParkReceipt) -> None:
        if len(park.receipts) > 1:
            self.violations.append(f"two receipts: {park.receipts}")
        if receipt.released:
            self._check_released(park)
        if receipt.released != park.released:
            self.violations.append(f"receipt and event differ about the release: {receipt}")

    def _check_restore(self, restore: RigRestore, receipt: RestoreReceipt) -> None:
        if len(restore.receipts) > 1:
            self.violations.append(f"two receipts: {restore.receipts}")
        wrong = restore.pages.wrong_rows(receipt.tokens) if receipt.tokens else []
        # What is before is the worker's to compute.
        wrong = [(group, at) for group, at in wrong if at >= receipt.loaded_from]
        if wrong:
            self.violations.append(f"{receipt} although {wrong} are wrong")
        running = self._running(restore)
        quiet = receipt.busy or (restore.worker.mode == "worker" and not receipt.tokens)
        if running and not quiet:
            self.violations.append(f"{receipt} although {running} may run")


def _pages(worker: RigWorker, tokens: int) -> list[bytes]:
    """Page ids, where they travel."""
    if worker.mode == "worker":
        return []
    count = -(-tokens // worker.geometry.page_tokens)
    return [b"".join(page.to_bytes(4, "little") for page in range(count))] * len(worker.geometry.groups)
