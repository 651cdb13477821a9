"""What a rig's core must come back to once everything that was begun has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from kvtier.host.allocator import room_bytes
from kvtier.keys import pack_tokens
from kvtier.messages.calls import MakePlan
from kvtier.node.blocks import ConversationId
from kvtier.node.coverage import Piece, restored_end
from kvtier.node.lookup import Query
from kvtier.node.park_job import ParkJob
from kvtier.node.state import Worker
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
    """What the node of `rig` would restore the conversation of a park from, in all slices of its ranks."""
    asked = job.message
    found = best_of_slices(rig, job.worker, (asked.tenant, asked.conversation), tokens, tuple(asked.extras))
    least = min(found, key=restored_end)
    if any(restored_end(pieces) > restored_end(least) for pieces in found):
        return least
    return sorted((p for pieces in found for p in pieces), key=lambda piece: piece.stored.meta.start)


def best_of_slices(
    rig: CoreRig,
    worker: Worker,
    name: ConversationId,
    tokens: Sequence[int],
    extras: tuple[tuple[int, bytes], ...] = (),
) -> list[list[Piece]]:
    """For each slice of a worker's ranks, what a worker with that slice alone would restore from."""
    message = MakePlan(worker="", conversation=name[1], tenant=name[0], tokens=b"")
    query = Query(pack_tokens(tokens), b"", 0, extras)
    alone = [replace(worker, shard=shard, ranks=()) for shard in worker.ranks or (worker.shard,)]
    return [rig.core._plans._best(message, one, query)[1] for one in alone]


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
        "plans of ranks": core._plans._shared,
        "parks of ranks": core._parks._acts._acts,
        "restores of ranks": core._restores._acts._jobs,
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
    held: Counter[tuple[str, bytes]] = Counter()
    named: dict[tuple[str, str], set[bytes]] = {}
    for block in state.tree:
        for whose in block.names:
            named.setdefault(whose, set()).add(block.key)
        for stored in block.parts.values():
            if stored.pins or stored.holds or stored.writing:
                yield f"{stored} has pins, is held, or is being written"
            hosted = stored.slot is not None
            if stored.slot != rig.host.find(stored.meta.object_id):
                yield f"{stored} is taken for one in a slot that it is not in"
            if not hosted and stored.on_disk is None:
                yield f"{stored} is nowhere"
            held["objects", block.root.fingerprint] += 1
            if hosted:
                held["host", block.root.fingerprint] += stored.meta.nbytes
                in_host.add(block.key)
                dirty += 0 if stored.durable else room_bytes(stored.meta.nbytes)
            if stored.on_disk is not None:
                on_disk.add(block.key)
                disk_bytes += room_bytes(stored.on_disk.nbytes) + room_bytes(1)
                held["disk", block.root.fingerprint] += stored.on_disk.nbytes
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
        known = set(policy)  # type: ignore[call-overload]  # of every policy that a rig uses
        if known != keys:
            yield f"the {name} policy knows {len(known)} blocks, the tier has {len(keys)}"
    if dirty != state.dirty_bytes:
        yield f"{state.dirty_bytes} bytes are counted as dirty, there are {dirty}"
    if disk_bytes != state.disk_held_bytes:
        yield f"{state.disk_held_bytes} bytes are counted on disk, there are {disk_bytes}"
    for what, counted in (
        ("objects", state.tree.objects),
        ("host", state.host_bytes_of),
        ("disk", state.disk_bytes_of),
    ):
        there = {fingerprint: n for (which, fingerprint), n in held.items() if which == what}
        if there != {fingerprint: n for fingerprint, n in counted.items() if n}:
            yield f"{what} of models are counted as {counted}, there are {there}"


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
