"""What a Park asks for: checked, keyed, and turned into a job."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvtier.errors import KvtierError, TokensError
from kvtier.messages.calls import CODECS, Park
from kvtier.node.blocks import Block, Private
from kvtier.node.limits import check_seconds
from kvtier.node.lookup import Query, block_refs, prefix_blocks
from kvtier.node.needs import needed_objects
from kvtier.node.park_job import ParkJob
from kvtier.node.state import NodeState, Worker, disk_bytes
from kvtier.objects import ObjectMeta


def new_job(state: NodeState, message: Park, worker: Worker, pending: Sequence[Private] = ()) -> ParkJob:
    """The job of a Park. Raises the caller's mistakes as KvtierError; nothing has changed then.

    pending: how other ranks, whose parks are under way, have keyed what is shared with nobody.
    """
    geometry = worker.geometry.at(message.fidelity)
    if message.codec and message.codec not in CODECS:
        raise KvtierError(f"codec '{message.codec}' is not known", fix=f"use one of {', '.join(CODECS)}")
    check_seconds("timeout_s", message.timeout_s)
    query = Query(message.tokens, message.after_key, message.after_tokens, tuple(message.extras))
    root = state.root(message.tenant, worker.fingerprint, message.fidelity, worker.geometry.block_tokens)
    prefix = prefix_blocks(state.tree, root, query, (message.tenant, message.conversation))
    private = _private(state, message, prefix, pending)
    refs = block_refs(root, query, private)
    if not refs:
        raise TokensError("there are no tokens to park", fix="give the tokens whose KV the pages hold")
    metas = needed_objects(root, refs, prefix, geometry, worker.shard, message.held_from)
    _check_front(state, metas, query.after_tokens, worker, message.held_from)
    return ParkJob(
        state.next_id("p"),
        worker,
        message.request,
        message.pages,
        events=message.events,
        message=message,
        root=root,
        query=query,
        private=private,
        metas=metas,
        started_s=state.now_s,
        todo=deque(metas),
        nbytes=sum(meta.nbytes for meta in metas),
        disk_nbytes=sum(disk_bytes(meta) for meta in metas),
    )


def _private(
    state: NodeState, message: Park, prefix: Sequence[Block], pending: Sequence[Private]
) -> Private | None:
    """From where on and with which salt the park is keyed. Raises TokensError.

    What goes on after a chain that is private already is keyed like it, or it would not be found again.
    """
    known = state.conversations.get((message.tenant, message.conversation))
    privates = known.privates() if known else []
    if prefix and prefix[-1].private is not None:
        return prefix[-1].private
    if message.share == "prefix":
        return None
    if message.private_from < message.after_tokens:
        raise TokensError(
            f"nothing is to be shared from token {message.private_from} on, but the front of "
            f"{message.after_tokens} tokens may be",
            fix="park all tokens from the start, without a front",
        )
    salts = [private[1] for private in (*privates, *pending) if private is not None]
    return (message.private_from, salts[0] if salts else state.rng.randbytes(16))


def _check_front(
    state: NodeState,
    metas: Sequence[ObjectMeta],
    after_tokens: int,
    worker: Worker,
    held_from: Sequence[int],
) -> None:
    """What of the front is not stored any longer has to be in the pool. Raises TokensError."""
    for meta in metas:
        group = meta.object_id.group
        if meta.start >= after_tokens or not held_from or held_from[group] <= meta.start:
            continue
        stored = state.tree.stored(meta.object_id)
        is_there = stored is not None and state.source_of(stored) is not None
        if worker.geometry.groups[group].kind == "full" and not is_there:
            raise TokensError(
                f"the front's block at token {meta.start} is not stored any longer",
                fix="send all tokens from the start, with the pages that hold them",
            )
