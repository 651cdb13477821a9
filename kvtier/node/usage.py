"""Tells the policies what conversations do: when they are asked for, parked, hinted at, and forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvtier.keys import TOKEN_BYTES
from kvtier.messages.calls import Hint, MakePlan, Park
from kvtier.node.blocks import Block, ConversationId
from kvtier.node.conversations import Conversation
from kvtier.node.state import NodeState
from kvtier.policy.usage import ParkedBlock, Turn

# How often it is looked who serves which model.
_LOOK_AGAIN_S = 5.0


def asked(state: NodeState, message: MakePlan) -> None:
    """A request begins: whoever it is of has come back. By prefix alone nobody is known."""
    if message.conversation:
        tokens = message.after_tokens + len(message.tokens) // TOKEN_BYTES
        state.policies.usage.asked((message.tenant, message.conversation), tokens, state.now_s)


def stored(state: NodeState, name: ConversationId, block: Block) -> None:
    """A park that is under way has stored a block."""
    state.policies.usage.stored(name, _parked(block), state.now_s)


def parked(state: NodeState, message: Park, model: bytes, chain: Sequence[Block]) -> None:
    """All of a conversation is stored, and it is idle from now on."""
    name = (message.tenant, message.conversation)
    known = state.conversations.get(name)
    turn = Turn(
        stop=message.stop,
        model=model,
        returns_at_s=None if message.returns_in_s is None else state.now_s + message.returns_in_s,
        keep_until_s=known.keep_until_s if known is not None else None,
    )
    state.policies.usage.parked(name, _all_parked(chain), turn, state.now_s)


def kept(state: NodeState, known: Conversation, model: bytes, chain: Sequence[Block]) -> None:
    """Another node's conversation is here too, and idle."""
    turn = Turn("", model, known.returns_at_s, known.keep_until_s)
    state.policies.usage.parked(known.id, _all_parked(chain), turn, state.now_s)


def hinted(state: NodeState, known: Conversation, message: Hint) -> None:
    """Somebody said when the conversation comes back, or until when it is worth keeping."""
    returns_at_s = None if message.returns_in_s is None else known.returns_at_s
    state.policies.usage.hinted(known.id, returns_at_s, known.keep_until_s, state.now_s)


def adopted(state: NodeState, record: Conversation, chains: dict[bytes, list[Block]]) -> None:
    """A conversation is known again after a restart; its newest branch last."""
    for head in record.heads:
        turn = Turn("", head.fingerprint, record.returns_at_s, record.keep_until_s)
        state.policies.usage.adopted(record.id, _all_parked(chains[head.key]), turn, head.parked_at_s)


def _parked(block: Block) -> ParkedBlock:
    return ParkedBlock(block.key, block.start, block.end, sum(s.meta.nbytes for s in block.parts.values()))


def _all_parked(chain: Sequence[Block]) -> Iterator[ParkedBlock]:
    return map(_parked, chain)


class Served:
    """Which models have workers, and since when others have none."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._last_s: dict[bytes, float] = {}
        self._again_s = 0.0
        # How many had been retired by hand at the last look.
        self._by_hand = 0

    def look(self) -> None:
        """Tell the policies now and then, and when somebody retired a model."""
        state = self._state
        if state.now_s < self._again_s and len(state.retired) == self._by_hand:
            return
        self._again_s = state.now_s + _LOOK_AGAIN_S
        served = {w.fingerprint: w.rate for w in state.workers.values() if w.connected}
        for model in state.models:
            if model in served:
                self._last_s[model] = state.now_s
            else:
                self._last_s.setdefault(model, state.now_s)
        names = {state.models[model] for model in served}
        limit_s = state.now_s - state.settings.retire_after_s
        retired = {
            model: None
            for model, name in state.models.items()
            if model not in served and name in names and self._last_s[model] <= limit_s
        }
        for model in [model for model in state.retired if model in served]:
            del state.retired[model]
        self._by_hand = len(state.retired)
        state.worthless = retired = {**retired, **state.retired}
        rates = {model: rate if rate is not None and rate.known else None for model, rate in served.items()}
        state.policies.usage.serves(rates, retired)
