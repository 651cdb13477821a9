"""What another node has of a conversation, brought into host memory for a restore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvtier.node.blocks import ConversationId, Stored
from kvtier.node.counters import count
from kvtier.node.held_plan import HeldPlan
from kvtier.node.peer_reads import PeerReads
from kvtier.node.state import NodeState
from kvtier.objects import ObjectMeta
from kvtier.receipts import Reason
from kvtier.tier import Slot

# What arrived, and why the rest did not: ('', '') when there is none.
PullEnded: TypeAlias = Callable[[list[Stored], Reason, str], None]
_REASONS: dict[str, Reason] = {"corrupt": "corrupt", "deadline": "deadline"}


class Pulls:
    """See the module's text. What has arrived is an object of this node's like any other."""

    def __init__(self, state: NodeState, reads: PeerReads) -> None:
        self._state = state
        self.reads = reads

    def start(
        self,
        held: HeldPlan,
        read_id: str,
        pairs: Sequence[tuple[ObjectMeta, Slot]],
        timeout_s: float,
        ended: PullEnded,
    ) -> None:
        """Read objects of the plan's other node into slots that `read_id` reserved; `ended` is told."""
        state, remote = self._state, held.remotes[held.shard]
        name = (held.plan.tenant, held.plan.conversation)

        def done(failed: dict[int, str], nbytes: int, seconds: float) -> None:
            if not set(state.stones_of(name)) <= set(remote.after):
                # Forgotten while it was on its way: it does not come back.
                for index, (_, slot) in enumerate(pairs):
                    if index not in failed:
                        state.host.abort(slot, quiet=True)
                ended([], "forgotten", "the conversation was forgotten")
                return
            for why in failed.values():
                count(state.counters.errors, f"peer_{why}")
            came = [pair for index, pair in enumerate(pairs) if index not in failed]
            arrived = [self._arrived(held, name, meta, slot) for meta, slot in came]
            why = failed[min(failed)] if failed else ""
            detail = f"of node '{remote.node}': {why}" if why else ""
            ended(arrived, _REASONS.get(why, "peer_lost") if why else "", detail)

        self.reads.start(read_id, remote.node, remote.epoch, pairs, timeout_s, done)

    def _arrived(self, held: HeldPlan, name: ConversationId, meta: ObjectMeta, slot: Slot) -> Stored:
        """It is the conversation's to forget from now on."""
        state, remote = self._state, held.remotes[held.shard]
        assert meta.checksum is not None, "a plan has no others"
        state.host.commit([(slot, meta.checksum)])
        stored = state.stored_in_host(meta)
        block = state.tree.get(meta.object_id.block_key)
        if block is not None:
            state.tree.name([block], name, remote.private)
        state.counters.pulled_bytes += meta.nbytes
        return stored
