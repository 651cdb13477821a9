"""One request as the cluster simulation sees it, whatever it was read or generated from."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Turn(NamedTuple):
    """A request. Its place in the stream, counted from 0, is its row.

    t_s: arrival; conversation: -1 unknown; tenant: a number; turn: of the conversation, from 0, -1 unknown.
    kind: 'u' new text of a person, 't' tool results only, '' unknown.  stop: why its output ended.
    service_s: -1 unknown.  Its first `shared_tokens` tokens are those of row `ref`, prompt and output
    together; ref is -1 and shared_tokens 0 where it shares nothing.
    """

    t_s: float
    conversation: int
    tenant: int
    turn: int
    tokens_in: int
    tokens_out: int
    kind: str
    stop: str
    service_s: float
    ref: int
    shared_tokens: int


@dataclass(slots=True)
class Draws:
    """What was drawn, before the end of the load cuts anything: seconds by kind, messages a session."""

    waits: dict[str, array[float]] = field(default_factory=dict)
    step_waits: array[float] = field(default_factory=lambda: array("d"))
    requests: dict[str, array[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TurnStream:
    """Turns in order of time. block_tokens: what the source counts prefixes in; total: rows, 0 unknown.

    draws: of a generated load; they grow while the turns are walked.
    """

    name: str
    block_tokens: int
    turns: Iterator[Turn]
    total: int = 0
    draws: Draws | None = None
