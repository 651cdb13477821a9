"""What a rig's core must come back to once everything that was begun has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvtier.host.allocator import room_bytes
from kvtier.keys import pack_tokens
from kvtier.messages import MakePlan
from kvtier.node.coverage import Piece, restored_end
from kvtier.node.lookup import Query
from kvtier.node.park_job import ParkJob
from kvtier.receipts import Level
from kvtier.testing.core_rig import CoreRig

# Longer than every lease, deadline and time-out of a core.
_LONG_S = 200.0


def drain(rig: CoreRig) -> None:
    """Let everything end: processes go on or are ended, what runs is carried out, and time passes."""
    for proc in rig.procs:
        proc.stopped = False
    rig.run()
    for proc in rig.procs:
        if proc.alive and not proc.connected:
            rig.kill(proc)
    for _ in range(4):
        rig.tick(_LONG_S)
        rig.run()


def problems(rig: CoreRig) -> list[str]:
    """Everything that is wrong with a rig at rest, violations on the way included; [] when all is well."""
    return [*rig.violations, *_unanswered(rig), *_under_way(rig), *_memory(rig), *_tree(rig), *_disk(rig)]


def watch_promises(rig: CoreRig, on_disk: Callable[[ParkJob, list[Piece]], None]) -> None:
    """Check every receipt of a park at the moment when it is given.

    on_disk: told of each that says 'disk', and from what it could be restored after power loss just then.
    """
    parks = rig.core._parks
    finish = parks._finish

    def checked(job: ParkJob, level: Level) -> None:
        tokens = rig.requests[job.message.request].pages.text.tokens
        if level != "none" and restored_end(pieces_of(rig, job, tokens)) < job.query.end:
            rig.violations.append(f"{job.name} is said to be in {level} to {job.query.end} and is not")
        finish(job, level)
        if level == "disk":
            reborn = rig.restarted()
            pieces = pieces_of(reborn, job, tokens)
            if restored_end(pieces) < job.query.end:
                rig.violations.append(f"{job.name} is said to be on disk to {job.query.end} and is not")
            on_disk(job, pieces)

    parks._finish = checked  # type: ignore[method-assign]


def pieces_of(rig: CoreRig, job: ParkJob, tokens: Sequence[int]) -> list[Piece]:
    """What the node of `rig` would restore the conversation of a park from."""
    asked = job.message
    message = MakePlan(worker="", conversation=asked.conversation, tenant=asked.tenant, tokens=b"")
    query = Query(pack_tokens(tokens), b"", 0, tuple(asked.extras))
    return rig.core._plans._best(message, job.worker, query)[1]


def _unanswered(rig: CoreRig) -> Iterator[str]:
    for use in rig.requests.values():
        if len(use.receipts) != 1:
            yield f"{len(use.receipts)} receipts for {use.message}"
    gone = {proc.peer for proc in rig.procs if not proc.connected}
    for request, answers in rig.answers.items():
        if len(answers) != 1 and rig.askers.get(request) not in gone:
            yield f"{len(answers)} answers to request {request}"


def _under_way(rig: CoreRig) -> Iterator[str]:
    core = rig.core
    for name, jobs in {
        "copies": core._copies.all(),
        "parks": core._parks._jobs,
        "restores": core._restores._jobs,
        "plans": core._plans._held,
        "deferred plans": core._plans._deferred,
        "writes": list(core._disk._requests.writes()),
        "reads": core._disk.reads._reads,
    }.items():
        if jobs:
            yield f"{name} are still under way: {jobs}"
    for worker in core.state.workers.values():
        if worker.jobs:
            yield f"{worker.name} still has {worker.jobs}"


def _memory(rig: CoreRig) -> Iterator[str]:
    usage = rig.host.usage()
    present = sum(room_bytes(meta.nbytes) for meta in rig.host.objects())
    if usage.used_bytes != present or usage.limbo_bytes or usage.filling_bytes:
        yield f"{usage} where {present} bytes are present"


def _tree(rig: CoreRig) -> Iterator[str]:
    state = rig.core.state
    in_host, on_disk, disk_bytes, dirty = set(), set(), 0, 0
    named: dict[tuple[str, str], set[bytes]] = {}
    for block in state.tree:
        for whose in block.names:
            named.setdefault(whose, set()).add(block.key)
        for stored in block.parts.values():
            if stored.pins or stored.holds or stored.writing:
                yield f"{stored} has pins, is held, or is being written"
            hosted = state.in_host(stored.meta.object_id)
            if not hosted and stored.on_disk is None:
                yield f"{stored} is nowhere"
            if hosted:
                in_host.add(block.key)
                dirty += 0 if stored.durable else room_bytes(stored.meta.nbytes)
            if stored.on_disk is not None:
                on_disk.add(block.key)
                disk_bytes += room_bytes(stored.on_disk.nbytes) + room_bytes(1)
        if block.parts and not block.names:
            yield f"{block} belongs to nobody"
    for whose, own in named.items():
        found = [block.key for block in state.tree.named(whose)]
        if set(found) != own or len(found) != len(own):
            yield f"{len(found)} blocks are found of {whose}, {len(own)} have its name"
    if len(in_host) != len({meta.object_id.block_key for meta in rig.host.objects()}):
        yield "host memory has objects that are in no tree"
    for name, policy, keys in (
        ("host", state.policies.host, in_host),
        ("disk", state.policies.disk, on_disk),
    ):
        known = set(policy._parents)  # type: ignore[attr-defined]  # of every policy that a rig uses
        if known != keys:
            yield f"the {name} policy knows {len(known)} blocks, the tier has {len(keys)}"
    if dirty != state.dirty_bytes:
        yield f"{state.dirty_bytes} bytes are counted as dirty, there are {dirty}"
    if disk_bytes != state.disk_held_bytes:
        yield f"{state.disk_held_bytes} bytes are counted on disk, there are {disk_bytes}"


def _disk(rig: CoreRig) -> Iterator[str]:
    state, store = rig.core.state, rig.store
    if store is None or not state.disk.ready:
        return
    known = {
        (s.meta.object_id.block_key, s.meta.object_id.group, s.meta.object_id.shard)
        for block in state.tree
        for s in block.parts.values()
        if s.on_disk is not None
    }
    # What a test removed behind the core's back is found out when it is read.
    if set(store.objects) - known:
        yield f"the disk has {len(set(store.objects) - known)} objects that the core does not know"
    for name in store.records:
        if name not in state.conversations:
            yield f"the disk has a record of {name}, which is over"
