"""Controls: with one line of the core's behaviour broken on purpose, the checks of this folder notice."""

import dataclasses

import pytest

from kvtier.host.slots import HostSlots
from kvtier.keys import make_root, tenant_secret
from kvtier.messages.calls import Forget, Released
from kvtier.node.blocks import Stored
from kvtier.node.disk_requests import DiskRequests, Written
from kvtier.node.disk_side import DiskSide
from kvtier.node.park_writes import ParkWrites
from kvtier.node.parks import Parks
from kvtier.node.peers import Peers
from kvtier.node.plans import Plans
from kvtier.node.restore_ends import RestoreEnds
from kvtier.node.state import NodeState
from kvtier.testing.core_rig import SECRET, CoreRig
from kvtier.testing.node_faults import (
    believe_a_disk_that_comes_late,
    count_a_job_as_quiet_when_it_is_over,
    remove_before_writing_more_rows,
)
from kvtier.testing.rig_checks import drain, problems, watch_promises
from kvtier.testing.rig_uses import HYBRID, UNIT


def begun(rig):
    for op in rig.copies():
        rig.begin(op)


# --- what happens -----------------------------------------------------------------------------------------


def late_gather(rig, worker):
    """A worker stops in a park, its lease ends, and somebody else needs the room."""
    rig.park(worker, "chat", range(8))
    begun(rig)
    rig.tick(11.0)
    rig.park(rig.attach(), "other", range(50, 58))


def many_batches(rig, worker):
    """A park has more than one batch."""
    rig.park(worker, "chat", range(16))
    rig.finish(rig.copies()[0])


def closed_socket(rig, worker):
    """A worker's socket closes while its copies run, and somebody else needs the room."""
    rig.park(worker, "chat", range(8))
    begun(rig)
    twin = rig.attach()
    rig.disconnect(worker.proc)
    rig.park(twin, "other", range(50, 58))


def two_tenants(rig, worker):
    """Two tenants park and restore the same tokens."""
    rig.park(worker, "chat", range(8), tenant="rival")
    rig.run()
    rig.resume(worker, "chat", range(8))


def to_disk(rig, worker):
    """A conversation is parked to disk."""
    rig.park(worker, "chat", range(8), level="disk")
    rig.run()


def plan_on_a_full_disk(rig, worker):
    """What a plan counts on lies on a disk that others need."""
    to_disk(rig, worker)
    reborn = rig.restarted()
    worker = reborn.attach()
    planned = reborn.plan(worker, "chat", range(8))
    reborn.park(worker, "other", range(50, 66), level="disk")
    reborn.run()
    restore = reborn.restore(worker, planned, range(8))
    reborn.run()
    if restore.receipt.tokens < 8:
        reborn.violations.append("what a plan held was taken away")
    drain(reborn)
    rig.violations += problems(reborn)


def plan_in_a_full_memory(rig, worker):
    """What a plan counts on lies in host memory that others need."""
    rig.park(worker, "chat", range(8))
    rig.run()
    rig.plan(worker, "chat", range(8))
    other = rig.park(worker, "other", range(50, 58))
    rig.run()
    if other.receipt.level != "none":
        rig.violations.append("what a plan held was taken away")


def late_scatter(rig, worker):
    """A restore is over while a copy into its pages runs."""
    worker = rig.attach(mode="shared")
    rig.park(worker, "chat", range(8))
    rig.run()
    rig.restore(worker, rig.plan(worker, "chat", range(8)), range(8), deadline_s=1.0)
    begun(rig)
    rig.tick(2.1)


def forgotten_while_written(rig, worker):
    """A conversation is forgotten while it is being written to disk."""
    rig.park(worker, "chat", range(8), level="disk")
    rig.run_copies()
    rig.ask(Forget(conversation="chat", tenant="acme"))
    rig.run()


def two_private_ones(rig, worker):
    """Two conversations that share nothing are parked and restored."""
    for name in ("mine", "theirs"):
        rig.park(worker, name, range(8), private_from=0)
        rig.run()
        rig.resume(worker, name, range(8))


def host_front(rig, worker):
    """A turn is parked to disk after a front that is only in host memory."""
    rig.park(worker, "chat", range(8))
    rig.run()
    rig.park(worker, "chat", range(12), after=rig.plan(worker, "chat", range(8)), level="disk")
    rig.run()


def forgotten_before_the_disk_is_there(rig, worker):
    """A node begins, and a conversation is forgotten before its disk says that it has it."""
    to_disk(rig, worker)
    late = rig.restarted(started=False)
    late.ask(Forget(conversation="chat", tenant="acme"))
    late.start_gpu()
    late.start_disk()
    if late.core.state.conversations:
        rig.violations.append("what was forgotten came back")


def more_rows_of_a_window(rig, worker):
    """The disk has less of a sliding layer than a later park, which it refuses to write."""
    worker = rig.attach(HYBRID, fingerprint=b"h" * 32)
    rig.park(worker, "chat", range(8), level="disk", held_from=[0, 3, 0])
    rig.run()
    rig.park(worker, "fork", range(7), level="disk")
    rig.run_copies()
    reborn = rig.restarted()
    twin = reborn.attach(HYBRID, fingerprint=b"h" * 32)
    if reborn.plan(twin, "chat", range(8)).plan.load_tokens < 8:
        rig.violations.append("what was promised to be on disk is lost")


# --- what is broken ---------------------------------------------------------------------------------------


def free_when_a_lease_ends(patch):
    abort = HostSlots.abort
    patch.setattr(HostSlots, "abort", lambda self, slot, quiet: abort(self, slot, quiet=True))


def free_when_a_socket_closes(patch):
    left = Peers.left

    def too_early(self, peer):
        left(self, peer)
        self._executor_ended(peer)

    patch.setattr(Peers, "left", too_early)


def forget_the_tenant(patch):
    def root(self, tenant, fingerprint, fidelity, block_tokens):
        return make_root(tenant_secret(SECRET, "all"), "all", fingerprint, fidelity, block_tokens)

    patch.setattr(NodeState, "root", root)


def say_disk_before_it_is_written(patch):
    write = DiskSide.write

    def too_early(self, objects, records, purpose, done, codec=""):
        done(Written(True))
        write(self, objects, records, purpose, lambda *_: None, codec)

    patch.setattr(DiskSide, "write", too_early)
    patch.setattr(Stored, "durable", property(lambda stored: True))


def hold_nothing_on_disk(patch):
    hold = Plans._hold

    def loosely(self, held):
        pieces = tuple(dataclasses.replace(p.stored) for p in held.pieces)
        loose = tuple(p._replace(stored=s) for p, s in zip(held.pieces, pieces, strict=True))
        hold(self, dataclasses.replace(held, pieces=loose))

    patch.setattr(Plans, "_hold", loosely)


def hold_nothing_in_memory(patch):
    hold = Plans._hold

    def loosely(self, held):
        hold(self, held)
        for piece in held.pieces:
            piece.stored.holds = 0

    patch.setattr(Plans, "_hold", loosely)


def release_after_the_first_batch(patch):
    copied = Parks.copied

    def too_early(self, job, pairs, message):
        copied(self, job, pairs, message)
        if not job.released:
            job.released = True
            self._state.send(job.worker.name, Released(request=job.request))

    patch.setattr(Parks, "copied", too_early)


def name_no_busy_pages(patch):
    patch.setattr(RestoreEnds, "_busy", lambda self, job: ())


def let_removals_overtake_writes(patch):
    patch.setattr(DiskRequests, "_is_held_back", lambda self, request: False)
    end = DiskSide._end_write

    def forgetful(self, write, ok):
        end(self, write, ok)
        self._requests._queue.clear()

    patch.setattr(DiskSide, "_end_write", forgetful)


def one_salt_for_all(patch):
    init = NodeState.__init__

    def salted(self, *args):
        init(self, *args)
        self.rng.randbytes = lambda count: b"s" * count

    patch.setattr(NodeState, "__init__", salted)


def write_only_what_is_new(patch):
    reached = ParkWrites.reached

    def careless(self, job):
        new = {m.object_id for m in job.metas if m.start >= job.query.after_tokens}
        job.metas = [m for m in job.metas if m.object_id in new]
        job.held = {object_id: stored for object_id, stored in job.held.items() if object_id in new}
        return reached(self, job)

    patch.setattr(ParkWrites, "reached", careless)


CONTROLS = {
    count_a_job_as_quiet_when_it_is_over: (late_gather, "may touch"),
    believe_a_disk_that_comes_late: (forgotten_before_the_disk_is_there, "came back"),
    remove_before_writing_more_rows: (more_rows_of_a_window, "is lost"),
    free_when_a_lease_ends: (late_gather, "may touch"),
    free_when_a_socket_closes: (closed_socket, "may touch"),
    forget_the_tenant: (two_tenants, "was given"),
    say_disk_before_it_is_written: (to_disk, "said to be"),
    hold_nothing_on_disk: (plan_on_a_full_disk, "taken away"),
    hold_nothing_in_memory: (plan_in_a_full_memory, "taken away"),
    release_after_the_first_batch: (many_batches, "released although"),
    name_no_busy_pages: (late_scatter, "may run"),
    let_removals_overtake_writes: (forgotten_while_written, "does not know"),
    one_salt_for_all: (two_private_ones, "was given"),
    write_only_what_is_new: (host_front, "said to be on disk"),
}


def outcome(scenario):
    units = 4 if scenario in (late_gather, closed_socket, plan_in_a_full_memory) else 64
    on_disk = 20 if scenario is more_rows_of_a_window else 14
    rig = CoreRig(arena_bytes=[units * UNIT], disk=on_disk * UNIT)
    watch_promises(rig, lambda job, pieces: None)
    scenario(rig, rig.attach())
    drain(rig)
    return "\n".join(problems(rig))


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_the_checks_notice(control, monkeypatch):
    scenario, complaint = CONTROLS[control]
    assert outcome(scenario) == ""
    control(monkeypatch)
    assert complaint in outcome(scenario)
