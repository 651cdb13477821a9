"""Which node holds how much of a conversation: by the ends of its branches, or by the next turn's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtier.cluster_messages import KnownConversation
from kvtier.messages import Locate, Located, MakePlan
from kvtier.node.elsewhere import Elsewhere
from kvtier.node.everywhere import Everywhere
from kvtier.node.lookup import Query
from kvtier.node.plans import Plans
from kvtier.node.state import NodeState, Worker

# (node, tokens held, expected seconds to load)
Place = tuple[str, int, float]


class Locating:
    """Answers Locate. own: this node's place by the conversation's own end."""

    def __init__(
        self,
        state: NodeState,
        elsewhere: Elsewhere,
        everywhere: Everywhere,
        plans: Plans,
        own: Callable[[Locate], list[Place]],
    ) -> None:
        self._state = state
        self._elsewhere = elsewhere
        self._everywhere = everywhere
        self._plans = plans
        self._own = own

    def locate(self, peer: str, message: Locate) -> None:
        """Answer it: the nodes that hold something of it, most tokens first.

        Tokens are compared as the workers attached here would key them; without any, ends of branches count.
        """
        worker = next((w for w in self._state.workers.values() if w.connected), None)
        if message.tokens and worker is not None:
            self._by_tokens(peer, message, worker)
            return

        def answer(known: Sequence[KnownConversation]) -> None:
            held = [place for one in known for place in one.held]
            self._tell(peer, message, self._own(message), held)

        self._everywhere.find(answer, tenant=message.tenant, conversation=message.conversation)

    def _by_tokens(self, peer: str, message: Locate, worker: Worker) -> None:
        plan = MakePlan(
            worker=worker.name,
            conversation=message.conversation,
            tenant=message.tenant,
            tokens=message.tokens,
        )
        here = self._plans.reaches(plan, worker)
        expected_s = max((eta_s for _, _, eta_s in self._own(message)), default=0.0)
        own = [(self._state.settings.node, here, expected_s)] if here else []

        def answer(fronts: Sequence[tuple[int, str, int, int]]) -> None:
            self._tell(peer, message, own, [(node, tokens) for _, node, _, tokens in fronts])

        query = Query(message.tokens, b"", 0, ())
        self._elsewhere.fronts(plan, worker, query, answer)

    def _tell(
        self, peer: str, message: Locate, own: Sequence[Place], others: Sequence[tuple[str, int]]
    ) -> None:
        node = self._state.settings.node
        longest: dict[str, int] = {}
        for name, tokens in others:
            if name != node:
                longest[name] = max(tokens, longest.get(name, 0))
        every = [*own, *((name, tokens, 0.0) for name, tokens in longest.items())]
        ranked = sorted(every, key=lambda place: (-place[1], place[0] != node, place[0]))
        self._state.send(peer, Located(id=message.id, nodes=ranked))
