"""The GPU and disk services of a simulated node: what its core sends them is answered after its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.node.events import Received, Send, Stimulus
from kvtier.sim.cluster.core_disk import SimulatedDisk
from kvtier.sim.cluster.events import Events
from kvtier.sim.cluster.links import Link


class Lines(NamedTuple):
    """A worker's two directions."""

    to_gpu: Link
    from_gpu: Link


class CoreServices:
    """tell: gives the core a stimulus. lines: by the name of a worker."""

    def __init__(
        self,
        events: Events,
        tell: Callable[[Stimulus], None],
        disk: SimulatedDisk,
        lines: Callable[[str], Lines],
    ) -> None:
        self._events, self._tell = events, tell
        self._disk, self._lines = disk, lines

    def take(self, send: Send) -> bool:
        """Whether the instruction was for a service, which answers it in time."""
        if isinstance(send.message, t.Copy):
            self._copy(send.peer, send.message)
        elif send.peer.startswith("disk"):
            self._to_disk(send.peer, send.message)
        else:
            return send.peer.startswith("gpu")
        return True

    def _copy(self, peer: str, copy: t.Copy) -> None:
        now_s, lines = self._events.now_s, self._lines(copy.worker)
        nbytes = sum(item.nbytes for item in copy.items)
        gather = copy.direction == "gather"
        done_s = (lines.from_gpu if gather else lines.to_gpu).send(now_s, nbytes)
        answer = t.Copied(
            job=copy.job,
            batch=copy.batch,
            ok=True,
            checksums=[1 if gather else None] * len(copy.items),
            bytes=nbytes,
            seconds=done_s - now_s,
        )
        self._events.at(done_s, self._tell, Received(peer, answer))

    def _to_disk(self, peer: str, message: m.Message) -> None:
        answered = self._disk.carry_out(message, self._events.now_s)
        if answered is None:
            return
        done_s, answer = answered
        self._events.at(done_s, self._tell, Received(peer, answer))
        self._events.at(done_s, self._tell, Received(peer, self._disk.usage()))
