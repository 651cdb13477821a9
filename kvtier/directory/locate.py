"""Where the next turn would have its first token soonest, by what each node has, can pull or must compute.

For each node the least, over its own front and every front that it could pull, of

    wait + max(load of its own front, pull of what is behind it) + prefill of the tokens behind the longer
    front

Loads and pulls run beside each other; a pull goes at the pace of the slowest of the source's tier and the
two links. These are expectations for choosing among nodes; the plan that the chosen node makes knows its
own devices better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.directory.lookups import Front

Floats: TypeAlias = npt.NDArray[np.float64]
Action: TypeAlias = Literal["load", "pull", "compute"]


class Prefill(Protocol):
    """How long computing takes on a node's worker; policy's recompute costs are such."""

    def seconds(self, past: int, new: int) -> float:
        """Expected seconds to compute `new` tokens after `past`."""


@dataclass(frozen=True, slots=True)
class Line:
    """start_s + bytes / bytes_per_s, as it was learned for a path."""

    start_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node last said of itself. wait_s: until its worker could begin, for prefills that wait.

    host, disk: of loads into its pool.  link: between it and others; queued_bytes: what the link has to carry
    first.  accepts: whether new turns may go there; a node that is drained is a source and no target.
    """

    prefill: Prefill
    host: Line
    disk: Line
    link: Line
    wait_s: float = 0.0
    queued_bytes: int = 0
    accepts: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """A node and what is best there. tokens: that need not be computed. source: of a pull.

    nbytes: to load and to pull.  pulled_bytes: of these over the network.
    """

    node: str
    expected_s: float
    action: Action
    tokens: int
    source: str = ""
    nbytes: int = 0
    pulled_bytes: int = 0


def rank(tokens: int, fronts: Sequence[Front], nodes: Mapping[str, NodeState]) -> list[Choice]:
    """Every node that accepts turns, the soonest first token first.

    tokens: of the whole request.  fronts: from `lookups.fronts`; those of nodes that said nothing of
    themselves do not count.  At least one token is always computed: the engine needs its output.
    """
    names = sorted(node for node, state in nodes.items() if state.accepts)
    if not names:
        return []
    sources = [front for front in fronts if front.node in nodes]
    own = {front.node: front for front in sources}
    times = _Times(names, sources, own, nodes, tokens)
    order = np.argsort(times.best_s, kind="stable")
    return [times.choice(int(row)) for row in order]


class _Times:
    """Seconds for [targets, options]: each front that could be pulled, then the node's own, then none."""

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Front],
        own: Mapping[str, Front],
        nodes: Mapping[str, NodeState],
        tokens: int,
    ) -> None:
        self._names, self._sources, self._own = names, sources, own
        states = [nodes[name] for name in names]
        # The last token is computed whatever is stored.
        most = max(tokens - 1, 0)
        self._reach = np.array([*(min(f.tokens, most) for f in sources)], np.int64)
        mine = np.array([min(own[n].tokens, most) if n in own else 0 for n in names], np.int64)
        loads = [_load_s(own[n], s) if n in own else 0.0 for n, s in zip(names, states, strict=True)]
        load_s = np.array(loads)
        compute = _computing(states, [*self._reach.tolist(), 0], mine.tolist(), tokens)
        self._pulled, pull_s = self._pulls(states, nodes, mine)
        pulling = np.maximum(load_s[:, None], pull_s) + compute[:, : len(sources)]
        # What brings nothing that the node lacks is no pull.
        pulling = np.where(self._reach[None, :] > mine[:, None], pulling, np.inf)
        loading = (load_s + compute[:, -1])[:, None]
        nothing = compute[:, len(sources)][:, None]
        wait_s = np.array([state.wait_s for state in states])[:, None]
        self._mine = mine
        every: Floats = wait_s + np.concatenate((pulling, loading, nothing), axis=1)
        self._at = every.argmin(axis=1)
        self.best_s: Floats = every.min(axis=1)

    def choice(self, row: int) -> Choice:
        """The best option of one node."""
        name, at = self._names[row], int(self._at[row])
        seconds, front = float(self.best_s[row]), self._own.get(name)
        mine = front.nbytes if front else 0
        if at < len(self._sources):
            pulled = int(self._pulled[row, at])
            reach = int(self._reach[at])
            return Choice(name, seconds, "pull", reach, self._sources[at].node, mine + pulled, pulled)
        if at == len(self._sources) and self._mine[row]:
            return Choice(name, seconds, "load", int(self._mine[row]), nbytes=mine)
        return Choice(name, seconds, "compute", 0)

    def _pulls(
        self, states: Sequence[NodeState], nodes: Mapping[str, NodeState], mine: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], Floats]:
        """Bytes and seconds of pulling what each source has behind each node's own front."""
        givers = [nodes[front.node] for front in self._sources]
        tiers = [g.disk if f.disk_bytes else g.host for g, f in zip(givers, self._sources, strict=True)]
        tokens = np.array([max(front.tokens, 1) for front in self._sources], np.int64)
        nbytes = np.array([front.nbytes for front in self._sources], np.int64)
        # Bytes of a front are spread evenly: exact for full attention, a fair guess where windows are.
        share = np.clip(1.0 - mine[:, None] / tokens, 0.0, 1.0)
        pulled = (share * nbytes).astype(np.int64)
        out_rate = [min(g.link.bytes_per_s, t.bytes_per_s) for g, t in zip(givers, tiers, strict=True)]
        in_rate = np.array([state.link.bytes_per_s for state in states])[:, None]
        out_s = np.array([t.start_s + _queue_s(g) for g, t in zip(givers, tiers, strict=True)])
        in_s = np.array([state.link.start_s + _queue_s(state) for state in states])[:, None]
        return pulled, in_s + out_s + pulled / np.minimum(in_rate, np.array(out_rate))


def _queue_s(state: NodeState) -> float:
    return state.queued_bytes / state.link.bytes_per_s


def _load_s(front: Front, state: NodeState) -> float:
    """Host memory and disk are read beside each other."""
    tiers = ((front.host_bytes, state.host), (front.disk_bytes, state.disk))
    return max((line.start_s + nbytes / line.bytes_per_s for nbytes, line in tiers if nbytes), default=0.0)


def _computing(
    states: Sequence[NodeState], reaches: Sequence[int], mine: Sequence[int], tokens: int
) -> Floats:
    """Seconds [nodes, reaches + own] of computing what is behind each front; equal ones are asked once."""
    distinct, at = np.unique(np.array([*reaches, *mine], np.int64), return_inverse=True)
    fronts = distinct.tolist()
    known: dict[int, list[float]] = {}
    for state in states:
        if id(state.prefill) not in known:
            seconds = state.prefill.seconds
            known[id(state.prefill)] = [seconds(past, tokens - past) for past in fronts]
    table = np.array([known[id(state.prefill)] for state in states])
    others, own = at[: len(reaches)], at[len(reaches) :]
    return np.concatenate((table[:, others], table[np.arange(len(states)), own][:, None]), axis=1)
