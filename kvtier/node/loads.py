"""How loaded a node is: what this one says of itself, and what the others said last. Pure.

A plan says how long its worker's prefills would wait, and what is to be moved between tiers is known
here; both are told to the directory, which hands them out with its answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from kvtier.messages.calls import MakePlan
from kvtier.messages.cluster import Load, Speed
from kvtier.node.balancing import last_tier
from kvtier.node.queues import Queues
from kvtier.node.state import NodeState, Worker, spare_bytes
from kvtier.policy import balance

# More often than that nobody reads it.
_SAY_EVERY_S = 1.0
# Below a thousandth a change is no news.
_ROUNDED = ".3g"
# What is beyond these no node means, and sums of times would not stay finite.
_LONGEST_S, _SLOWEST_BYTES_PER_S = 1e9, 1e-3


class Loads:
    """See the module's text. of: by other node, what it said last."""

    def __init__(self, state: NodeState, queues: Queues) -> None:
        self._state = state
        self._queues = queues
        self._free_s: dict[str, float] = {}
        self._said: Load | None = None
        self._said_s = 0.0
        self.of: dict[str, Load] = {}

    def asked(self, worker: Worker, message: MakePlan) -> None:
        """A worker said with its plan how long a prefill would wait there."""
        self._free_s[worker.name] = self._state.now_s + message.prefill_wait_s

    def heard(self, loads: Mapping[str, Load]) -> None:
        """The directory said of nodes what they last said; what cannot be reckoned with is left out."""
        self.of.update({node: load for node, load in loads.items() if _is_sound(load)})

    def own(self) -> Load:
        """This node's, now."""
        queued = self._queues.bytes()
        host, disk, peer = (self._speed(source, queued[source]) for source in ("host", "disk", "peer"))
        state = self._state
        return Load(
            host,
            disk,
            peer,
            self._wait_s(),
            not state.draining,
            int(_rounded(spare_bytes(state))),
            state.settings.failure_domain,
            self._takes_bytes(),
        )

    def news(self) -> Load | None:
        """What the directory is to be told now, if anything: changes, and not each at once."""
        state = self._state
        early = self._said is not None and state.now_s < self._said_s + _SAY_EVERY_S
        if early or not state.settings.ask_elsewhere_s:
            return None
        load = self.own()
        if load == self._said:
            return None
        self._said, self._said_s = load, state.now_s
        return load

    def _speed(self, source: str, queued_bytes: int) -> Speed:
        line = self._state.policies.restore.line(source, queued_bytes)
        return Speed(_rounded(line.start_s), _rounded(line.bytes_per_s))

    def _takes_bytes(self) -> int:
        tier = last_tier(self._state) if not self._state.draining else None
        if tier is None:
            return 0
        return int(_rounded(balance.takes_bytes(tier.used_bytes, tier.capacity_bytes)))

    def _wait_s(self) -> float:
        """Until the first of the workers could begin to compute."""
        workers, now_s = self._state.workers, self._state.now_s
        self._free_s = {name: free_s for name, free_s in self._free_s.items() if name in workers}
        waits = [max(self._free_s.get(w.name, now_s) - now_s, 0.0) for w in workers.values() if w.connected]
        return _rounded(min(waits, default=0.0))


def _is_sound(load: Load) -> bool:
    speeds = (load.host, load.disk, load.peer)
    waits = (load.wait_s, *(speed.start_s for speed in speeds))
    return all(0 <= wait_s <= _LONGEST_S for wait_s in waits) and all(
        _SLOWEST_BYTES_PER_S <= speed.bytes_per_s < inf for speed in speeds
    )


def _rounded(number: float) -> float:
    return float(format(number, _ROUNDED))
