"""How fast a recorded node's services were: what a simulation of another run is calibrated with.

The log is given to the daemon's own core again, so that what it asked of its services is known, and when;
their answers stand in the log with their times.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from kvtier.errors import KvtierError
from kvtier.messages import calls as m
from kvtier.messages import tiers as t
from kvtier.node import journal
from kvtier.node.core import NodeCore
from kvtier.node.events import Received, Send
from kvtier.policy.interfaces import Policies
from kvtier.sim.stimuli import slots_of

Entry = dict[str, Any]
MakePolicies = Callable[[], Policies]
_MOST_FITTED: Final = 1000
# Where more bytes took no longer.
_FASTEST: Final = 1e12


@dataclass(frozen=True, slots=True)
class Speed:
    """seconds = start_s + bytes / bytes_per_s."""

    start_s: float
    bytes_per_s: float


# Of a service that was asked for nothing.
UNSEEN: Final = Speed(0.0, _FASTEST)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How fast a node's services were. gather: from the pool to host memory; scatter: back."""

    gather: Speed
    scatter: Speed
    read: Speed
    write: Speed


@dataclass(frozen=True, slots=True)
class _Order:
    """What a service was asked to do. line: those of one line are done one after the other."""

    at_s: float
    kind: str
    line: str
    nbytes: int


def always(_: float) -> bool:
    """At any time."""
    return True


def calibrate(
    entries: Iterable[Entry],
    make_policies: MakePolicies,
    secret: bytes,
    counts: Callable[[float], bool] = always,
) -> Calibration:
    """Fit the services of a recorded run: how long each order took, once those before it were done.

    counts: whether what ended at a time of the log does.
    """
    asked: dict[tuple[str, str, int], _Order] = {}
    free_s: dict[str, float] = {}
    seen: dict[str, list[tuple[int, float]]] = {"gather": [], "scatter": [], "read": [], "write": []}
    for at_s, stimulus, sends in replayed(entries, make_policies, secret):
        message = stimulus.message if isinstance(stimulus, Received) else None
        if isinstance(message, t.Copied | t.DiskReadDone | t.DiskWritten):
            order = asked.pop(_job(message), None)
            if order is not None:
                begun_s = max(order.at_s, free_s.get(order.line, 0.0))
                if counts(at_s):
                    seen[order.kind].append((order.nbytes, at_s - begun_s))
                free_s[order.line] = at_s
        for send in sends:
            found = _ordered(at_s, send.message)
            if found is not None:
                asked[_job(send.message)] = found
    return Calibration(**{kind: _fitted(pairs) for kind, pairs in seen.items()})


def _ordered(at_s: float, message: m.Message) -> _Order | None:
    if isinstance(message, t.Copy):
        nbytes = sum(item.nbytes for item in message.items)
        return _Order(at_s, message.direction, f"{message.worker} {message.direction}", nbytes)
    if isinstance(message, t.DiskRead | t.DiskWrite):
        kind = "read" if isinstance(message, t.DiskRead) else "write"
        return _Order(at_s, kind, kind, sum(item.nbytes for item in message.slots))
    return None


def replayed(
    entries: Iterable[Entry], make_policies: MakePolicies, secret: bytes
) -> Iterator[tuple[float, Any, list[Send]]]:
    """(Time, stimulus or Origin, instructions) of a log."""
    core: NodeCore | None = None
    for entry in entries:
        if "origin" in entry:
            origin = msgspec.convert(entry["origin"], journal.Origin)
            core = new_core(origin, make_policies, secret)
            yield 0.0, origin, []
            continue
        if core is None:
            raise KvtierError("the log does not begin with the start of a node")
        stimulus = journal.unpack(entry)
        yield entry["at_s"], stimulus, core.handle(entry["at_s"], stimulus)


def new_core(origin: journal.Origin, make_policies: MakePolicies, secret: bytes) -> NodeCore:
    return NodeCore(
        origin.settings,
        slots_of(origin),
        make_policies(),
        secret,
        random.Random(origin.seed),
        epoch=origin.epoch,
        arena_bytes=list(origin.arena_bytes),
        generation_slots=origin.generation_slots,
    )


def _job(message: Any) -> tuple[str, str, int]:
    disk = isinstance(message, t.DiskRead | t.DiskReadDone | t.DiskWrite | t.DiskWritten)
    return ("disk" if disk else "gpu", message.job, getattr(message, "batch", 0))


def _fitted(pairs: list[tuple[int, float]]) -> Speed:
    """The median slope over pairs of orders (Theil 1950, Sen 1968) and the median start, neither negative."""
    if not pairs:
        return UNSEEN
    nbytes, seconds = (np.array(column, np.float64)[:_MOST_FITTED] for column in zip(*pairs, strict=True))
    more = nbytes[:, None] - nbytes[None, :]
    rising = more > np.float64(0)
    slopes = (seconds[:, None] - seconds[None, :])[rising] / more[rising]
    slope = max(float(np.median(slopes)) if slopes.size else 0.0, 1 / _FASTEST)
    return Speed(max(float(np.median(seconds - slope * nbytes)), 0.0), 1 / slope)
