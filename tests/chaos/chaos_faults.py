"""What is done to the nodes in one round: drawn from its seed as a schedule, then carried out."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from chaos_damage import KINDS as DAMAGES
from chaos_load import Chair
from chaos_nodes import Node, Nodes
from chaos_wires import STATES

_MEAN_GAP_S = 1.2
# How often, against each other.
_KINDS = {
    "kill": 5,
    "stop": 4,
    "kill node": 2,
    "kill all": 1,
    "kill worker": 2,
    "stop worker": 3,
    "link": 6,
    "leave": 1,
}
# With the feature of that name; each is several at once.
_DAMAGE_WEIGHT, _DAMAGES_MOST = 4, 6
# What leaves services alive, so that it is seen whether they grow.
GENTLE = ("stop", "kill worker", "stop worker", "link")
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """at_s: after the round's beginning.  for_s: until it is undone.  what: a service, a link's state, or
    what is done to a store.
    """

    at_s: float
    for_s: float
    kind: str
    who: str
    what: str = ""

    def __str__(self) -> str:
        return f"{self.at_s:.2f} s: {self.kind} {self.who} {self.what} for {self.for_s:.2f} s"


def drawn(
    draw: random.Random,
    seconds: float,
    nodes: Mapping[str, Node],
    chairs: Sequence[str],
    *,
    damage: bool = False,
    kinds: Sequence[str] = (),
) -> list[Fault]:
    """The faults of a round, in order. damage: of stores too.  kinds: these alone."""
    faults, at_s = [], 0.0
    names = list(nodes)
    weights = {kind: weight for kind, weight in _KINDS.items() if not kinds or kind in kinds}
    if damage:
        weights["damage"] = _DAMAGE_WEIGHT
    while (at_s := at_s + draw.expovariate(1 / _MEAN_GAP_S)) < seconds:
        kind = draw.choices(list(weights), list(weights.values()))[0]
        node = draw.choice(names)
        service = draw.choice(nodes[node].names)
        if kind == "link":
            other = draw.choice([name for name in names if name != node])
            both = draw.choice(("", "both "))
            faults.append(
                Fault(at_s, draw.uniform(0.3, 6), kind, f"{node}>{other}", both + draw.choice(STATES))
            )
        elif kind == "kill all":
            # Nobody is left who knows anything but from a disk.
            faults += [Fault(at_s, draw.uniform(0.05, 3), "kill node", name) for name in names]
        elif kind == "damage":
            for_s = draw.uniform(0.05, 2)
            what = draw.choices(list(DAMAGES), list(DAMAGES.values()))[0]
            # One after the other, and each elsewhere.
            faults += [
                Fault(at_s + number / 1000, for_s, kind, node, what)
                for number in range(draw.randint(1, _DAMAGES_MOST))
            ]
        elif kind.endswith("worker"):
            faults.append(Fault(at_s, draw.uniform(0.1, 6), kind, draw.choice(chairs)))
        elif kind == "stop":
            faults.append(Fault(at_s, draw.choice((0.3, 1.0, 2.5, 5.0)), kind, node, service))
        else:
            faults.append(Fault(at_s, draw.uniform(0.05, 3), kind, node, service if kind == "kill" else ""))
    return faults


class Doer:
    """Carries schedules out. What takes long, such as a start, runs beside."""

    def __init__(self, nodes: Nodes, chairs: Sequence[Chair], note: Callable[[str], None]) -> None:
        self._nodes, self._note = nodes, note
        self._chairs = {chair.name: chair for chair in chairs}
        self._pool = ThreadPoolExecutor(8, "faults")
        self._running: list[Future[None]] = []

    def carry_out(self, faults: Sequence[Fault], seconds: float, ended: threading.Event) -> None:
        """Until the round is over and everything is undone, or the event says that it makes no sense."""
        steps = [(fault.at_s, fault, True) for fault in faults]
        steps += [(min(fault.at_s + fault.for_s, seconds), fault, False) for fault in faults]
        began_s = time.monotonic()
        for at_s, fault, begins in sorted(steps, key=lambda step: step[0]):
            if ended.wait(max(0.0, began_s + at_s - time.monotonic())):
                break
            self._note(f"{fault}" if begins else f"    over: {fault}")
            self._running.append(self._pool.submit(self._begin if begins else self._end, fault))
            self._raise_done()
        ended.wait(max(0.0, began_s + seconds - time.monotonic()))
        for future in self._running:
            future.result(_PATIENCE_S)
        self._running.clear()

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown(cancel_futures=True)

    def _raise_done(self) -> None:
        for future in [future for future in self._running if future.done()]:
            self._running.remove(future)
            future.result()

    def _begin(self, fault: Fault) -> None:
        node = self._nodes.all.get(fault.who)
        if fault.kind == "link":
            self._link(fault, over=False)
        elif fault.kind == "kill worker":
            self._chairs[fault.who].kill()
        elif fault.kind == "stop worker":
            self._chairs[fault.who].signal(signal.SIGSTOP)
        elif node is not None and fault.kind == "stop":
            node.stop(fault.what)
        elif node is not None and fault.kind == "damage":
            node.damage(fault.what, fault.at_s)  # type: ignore[arg-type]  # one of DAMAGES
        elif node is not None and fault.kind == "leave":
            node.out_of_service()
        elif node is not None:
            node.kill(*filter(None, [fault.what]))

    def _end(self, fault: Fault) -> None:
        node = self._nodes.all.get(fault.who)
        if fault.kind == "link":
            self._link(fault, over=True)
        elif fault.kind == "kill worker":
            self._chairs[fault.who].back()
        elif fault.kind == "stop worker":
            self._chairs[fault.who].signal(signal.SIGCONT)
        elif node is not None and fault.kind == "stop":
            node.go_on(fault.what)
        elif node is not None:
            if fault.kind == "leave":
                node.leave()
            node.back()

    def _link(self, fault: Fault, *, over: bool) -> None:
        source, _, target = fault.who.partition(">")
        both, _, state = fault.what.rpartition(" ")
        for one, other in ((source, target), (target, source)) if both else ((source, target),):
            self._nodes.put(one, other, "open" if over else state)  # type: ignore[arg-type]
