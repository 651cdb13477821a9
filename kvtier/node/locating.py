"""Where the next turn would have its first token soonest, among the nodes that hold some of its conversation.

What each node has is known by the ends of the conversation's branches, or by the next turn's tokens; how
fast each would load, pull or compute it, by what the nodes said last (see loads.py).  `directory.locate`
ranks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvtier.directory.locate import Line, Prefill, rank
from kvtier.directory.locate import NodeState as Ranked
from kvtier.directory.lookups import Front
from kvtier.messages.calls import Locate, Located, MakePlan
from kvtier.messages.cluster import KnownConversation, Load, Reach, Speed
from kvtier.node.coverage import restored_end
from kvtier.node.elsewhere import Elsewhere
from kvtier.node.everywhere import Everywhere
from kvtier.node.loads import Loads
from kvtier.node.lookup import Query
from kvtier.node.plans import Plans
from kvtier.node.ranks import present, slices_of
from kvtier.node.state import NodeState, Worker

# (node, tokens held, expected seconds)
Place = tuple[str, int, float]
# Of computing a token: longer than any path takes to load one, and not so long that sums lose microseconds.
_DEAR_S = 1e4


class Locating:
    """Answers Locate. own: this node's place by the conversation's own end."""

    def __init__(
        self,
        state: NodeState,
        elsewhere: Elsewhere,
        everywhere: Everywhere,
        plans: Plans,
        loads: Loads,
        own: Callable[[Locate], list[Place]],
    ) -> None:
        self._state = state
        self._elsewhere = elsewhere
        self._everywhere = everywhere
        self._plans = plans
        self._loads = loads
        self._own = own

    def locate(self, peer: str, message: Locate) -> None:
        """Answer it: the nodes that hold something of it, the soonest first token first.

        Tokens are compared as the workers attached here would key them; without any, ends of branches count.
        Where no worker is attached nothing is known of sizes: then it is most tokens first.
        """
        worker = next((w for w in self._state.workers.values() if w.connected), None)
        if message.tokens and worker is not None:
            self._by_tokens(peer, message, worker)
            return

        def answer(known: Sequence[KnownConversation]) -> None:
            own = self._own(message)
            held = [place for one in known for place in one.held if place[0] != self._state.settings.node]
            if worker is None:
                nodes = [*own, *((name, tokens, 0.0) for name, tokens in held)]
                nodes.sort(key=lambda place: (-place[1], place[0] != self._state.settings.node, place[0]))
            else:
                each = worker.geometry.token_bytes
                fronts = [Front(name, 0, 0, tokens, tokens * each, 0) for name, tokens in held]
                fronts += [self._own_end(message, tokens) for _, tokens, _ in own]
                # The next turn goes on behind the longest branch.
                nodes = self._ranked(max((f.tokens for f in fronts), default=0) + 1, fronts, worker)
            self._state.send(peer, Located(id=message.id, nodes=nodes))

        self._everywhere.find(answer, tenant=message.tenant, conversation=message.conversation)

    def _own_end(self, message: Locate, tokens: int) -> Front:
        """What this node has of its own newest branch."""
        state = self._state
        known = state.conversations[message.tenant, message.conversation]
        nbytes = {"host": 0, "disk": 0, None: 0}
        for block in state.tree.chain(known.heads[-1].key):
            for stored in block.parts.values() if block.start < tokens else ():
                nbytes[state.source_of(stored)] += stored.meta.nbytes
        return Front(state.settings.node, state.epoch, 0, tokens, nbytes["host"], nbytes["disk"])

    def _by_tokens(self, peer: str, message: Locate, worker: Worker) -> None:
        plan = MakePlan(
            worker=worker.name,
            conversation=message.conversation,
            tenant=message.tenant,
            tokens=message.tokens,
        )
        pieces = self._plans.front(plan, worker)
        nbytes = {"host": 0, "disk": 0, "peer": 0}
        for piece in pieces:
            nbytes[piece.source] += piece.stored.meta.nbytes
        own = Front(
            self._state.settings.node,
            self._state.epoch,
            0,
            restored_end(pieces),
            nbytes["host"],
            nbytes["disk"],
        )
        query = Query(message.tokens, b"", 0, ())

        def answer(reaches: Sequence[Reach]) -> None:
            others = [Front(r.node, r.epoch, 0, r.tokens, r.host_bytes, r.disk_bytes) for r in reaches]
            nodes = self._ranked(query.end, [own, *others] if own.tokens else others, worker)
            self._state.send(peer, Located(id=message.id, nodes=nodes))

        slices = present(slices_of(self._state, worker, plan.fidelity))
        self._elsewhere.fronts(plan, worker, query, slices, answer)

    def _ranked(self, tokens: int, fronts: Iterable[Front], worker: Worker) -> list[Place]:
        """The holders by when they would have the first token; behind them those whose load is not known."""
        longest: dict[str, Front] = {}
        for front in fronts:
            known = longest.get(front.node)
            if known is None or known.tokens < front.tokens:
                longest[front.node] = front
        here = self._state.settings.node
        loads = self._loads.of | {here: self._loads.own()}
        rate = worker.rate if worker.rate is not None and worker.rate.known else None
        prefill: Prefill = rate if rate is not None else _Dear()
        nodes = {name: _ranked_state(loads[name], prefill) for name in longest if name in loads}
        places = []
        # Of equals this node: no request has to travel.
        choices = rank(tokens, list(longest.values()), nodes)
        for choice in sorted(choices, key=lambda choice: (choice.expected_s, choice.node != here)):
            expected_s = choice.expected_s
            if rate is None:
                expected_s -= prefill.seconds(choice.tokens, tokens - choice.tokens)
            places.append((choice.node, longest[choice.node].tokens, expected_s))
        unknown = [(name, front.tokens, 0.0) for name, front in longest.items() if name not in loads]
        return places + sorted(unknown, key=lambda place: (-place[1], place[0]))


class _Dear:
    """Where it is not known how fast workers compute: nothing that is stored anywhere is computed again."""

    def seconds(self, past: int, new: int) -> float:
        """See Prefill."""
        return _DEAR_S * new


def _ranked_state(load: Load, prefill: Prefill) -> Ranked:
    return Ranked(
        prefill=prefill,
        host=_line(load.host),
        disk=_line(load.disk),
        link=_line(load.peer),
        wait_s=load.wait_s,
        accepts=load.accepts,
    )


def _line(speed: Speed) -> Line:
    return Line(speed.start_s, speed.bytes_per_s)
