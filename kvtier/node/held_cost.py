"""What keeping a conversation costs an hour, and what its return would spare. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.node.blocks import Block
from kvtier.node.state import NodeState
from kvtier.policy.prices import Tier


def of_blocks(state: NodeState, blocks: Iterable[Block]) -> float | None:
    """Money an hour for all copies of these blocks here; None without prices."""
    if state.policies.money.prices is None:
        return None
    held: dict[Tier, int] = {"host": 0, "disk": 0}
    for block in blocks:
        for stored in block.parts.values():
            held["host"] += stored.meta.nbytes if stored.slot is not None else 0
            held["disk"] += stored.on_disk.nbytes if stored.on_disk is not None else 0
    return state.policies.money.per_hour(held)


def of_conversation(state: NodeState, head: bytes) -> float | None:
    """The same for the branch that ends with the block `head`."""
    return of_blocks(state, state.tree.chain(head)) if state.policies.money.prices is not None else None


def saved_gpu_s(state: NodeState, chain: Sequence[Block]) -> float | None:
    """Expected seconds of a worker's GPUs; None where nobody reckons."""
    if not chain:
        return None
    nbytes = sum(stored.meta.nbytes for block in chain for stored in block.parts.values())
    tokens = (chain[0].start, chain[-1].end)
    account = state.policies.usage.account(chain[-1].key, nbytes, tokens, state.now_s)
    return None if account is None else account.horizon_returns * account.recompute_s
