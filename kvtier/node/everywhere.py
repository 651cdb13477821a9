"""Questions of people that other nodes have a part of the answer to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from kvtier.messages.cluster import DIRECTORY, FindConversations, Known, KnownConversation
from kvtier.node import limits
from kvtier.node.loads import Loads
from kvtier.node.state import NodeState
from kvtier.receipts import ConversationInfo

# Told what the directory knows; nothing where it does not answer in time, or the node is alone.
TellKnown = Callable[[Sequence[KnownConversation]], None]
# A list of conversations may be long, and nobody's restore waits for it.
_MOST_S = 3.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    until_s: float
    tell: TellKnown


class Everywhere:
    """Asks the directory about conversations, for a bounded time."""

    def __init__(self, state: NodeState, loads: Loads) -> None:
        self._state = state
        self._loads = loads
        self._waiting: dict[str, _Waiting] = {}

    def find(
        self,
        tell: TellKnown,
        *,
        tenant: str,
        conversation: str = "",
        after: tuple[str, str] | None = None,
        limit: int = 1,
    ) -> None:
        """One conversation, or a page of them in order of (tenant, name) after the given one."""
        state = self._state
        if not state.settings.ask_elsewhere_s:
            tell(())
            return
        job = state.next_id("f")
        self._waiting[job] = _Waiting(state.now_s + _MOST_S, tell)
        question = FindConversations(
            job=job, tenant=tenant, conversation=conversation, after=after, limit=limit
        )
        state.send(DIRECTORY, question)

    def on_known(self, peer: str, message: Known) -> None:
        """The directory's answer."""
        self._loads.heard(message.loads)
        waiting = self._waiting.pop(message.job, None)
        if waiting is not None:
            waiting.tell([_sound(one) for one in message.conversations])

    def tick(self) -> None:
        """What is here is the answer for those who waited for too long."""
        for job in [job for job, waiting in self._waiting.items() if waiting.until_s <= self._state.now_s]:
            self._waiting.pop(job).tell(())


def _sound(known: KnownConversation) -> KnownConversation:
    """Without nodes that hold less or more of it than there may be."""
    held = tuple((node, tokens) for node, tokens in known.held if 0 <= tokens < limits.MOST_TOKENS)
    return msgspec.structs.replace(known, held=held)


def merged(here: ConversationInfo | None, known: KnownConversation | None, node: str) -> ConversationInfo:
    """What this node and the directory know of one conversation. node: this one's name."""
    if known is None:
        assert here is not None, "somebody knows it"
        return replace(here, nodes=(node,))
    nodes = tuple(sorted({name for name, _ in known.held} | ({node} if here is not None else set())))
    longest = max((tokens for _, tokens in known.held), default=0)
    if here is None:
        return ConversationInfo(
            conversation=known.conversation,
            tenant=known.tenant,
            version=0,
            tokens=longest,
            branches=known.branches,
            model="",
            parked_at_s=known.parked_at_s,
            host_tokens=0,
            disk_tokens=0,
            bytes=0,
            nodes=nodes,
        )
    return replace(
        here,
        nodes=nodes,
        branches=max(here.branches, known.branches),
        parked_at_s=max(here.parked_at_s, known.parked_at_s),
        tokens=max(here.tokens, longest),
    )
