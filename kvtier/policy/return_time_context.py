"""What a return time is judged by, sorted into classes: why the output stopped, the gaps before, lengths."""

from __future__ import annotations

from bisect import bisect_right
from operator import add
from typing import Final, Literal, NamedTuple

import numpy as np

from kvtier.policy.baselines.interfaces import IntArray

Clock = Literal["end", "arrival"]
_STOPS: Final = {"": 0, "tool_use": 1, "end_turn": 2}
_OTHER_STOP: Final = 3
_STOPS_AND_CLOCKS: Final = 9
_RUNNING: Final = 8
_KINDS: Final = {"": 0, "u": 1, "t": 2}
# Tenants whose numbers are equal modulo one less than this share a class; 0 has its own.
_TENANTS: Final = 64
_HOURS: Final = 24
_HOURS_A_CLASS: Final = 3


class Context(NamedTuple):
    """One wait for the next request of a conversation.

    clock: whether it is counted from the end of the last request or, where that is unknown, from its
    arrival.  stop: why the output stopped; None while it runs.  Negative numbers: unknown.
    gap_s: of the wait before this one, by the same clock, and gap_before_s that of the one before it.
    turns: requests of the conversation before this one.  new_tokens: what the prompt had more than the last.
    tenant: a number, 0 where there is only one.  hour: of the day when the wait starts, 0 to 24.
    """

    clock: Clock
    stop: str | None
    kind: str
    turns: int
    tokens_in: int
    new_tokens: int
    tokens_out: int = -1
    duration_s: float = -1.0
    gap_s: float = -1.0
    gap_before_s: float = -1.0
    tenant: int = 0
    hour: float = -1.0


# name -> how many classes; "all" is what every context has.
FEATURES: Final[dict[str, int]] = {
    "all": 1,
    "stop": _STOPS_AND_CLOCKS,
    "kind": _STOPS_AND_CLOCKS * len(_KINDS),
    "gap": 12,
    "stop and gap": _STOPS_AND_CLOCKS * 12,
    "gap before": 12,
    "tokens out": 8,
    "duration": 8,
    "turns": 8,
    "new tokens": 10,
    "tokens in": 10,
    "tenant": _TENANTS,
    "hour": 1 + _HOURS // _HOURS_A_CLASS,
}
_STARTS: Final = dict(zip(FEATURES, np.cumsum([0, *FEATURES.values()]).tolist(), strict=False))
_FIRSTS: Final = tuple(_STARTS.values())
CODES: Final = sum(FEATURES.values())


def _doublings(least: float, classes: int) -> tuple[float, ...]:
    """Where a number's classes begin: what is known, `least`, each doubling of it. Below is the unknown."""
    return (0.0, *(least * 2.0**step for step in range(classes - 2)))


_GAPS: Final = _doublings(2, FEATURES["gap"])
_GAPS_BEFORE: Final = _doublings(2, FEATURES["gap before"])
_TOKENS_OUT: Final = _doublings(50, FEATURES["tokens out"])
_DURATIONS: Final = _doublings(2, FEATURES["duration"])
_TURNS: Final = _doublings(1, FEATURES["turns"])
_NEW_TOKENS: Final = _doublings(128, FEATURES["new tokens"])
_TOKENS_IN: Final = _doublings(1000, FEATURES["tokens in"])


def codes_of(context: Context) -> IntArray:
    """One number for each feature, below CODES, int32."""
    stop = _stop_class(context)
    gap = bisect_right(_GAPS, context.gap_s)
    # In the order of FEATURES.
    classes = (
        0,
        stop,
        stop * len(_KINDS) + _KINDS.get(context.kind, 0),
        gap,
        stop * FEATURES["gap"] + gap,
        bisect_right(_GAPS_BEFORE, context.gap_before_s),
        bisect_right(_TOKENS_OUT, context.tokens_out),
        bisect_right(_DURATIONS, context.duration_s),
        bisect_right(_TURNS, context.turns),
        bisect_right(_NEW_TOKENS, context.new_tokens),
        bisect_right(_TOKENS_IN, context.tokens_in),
        1 + context.tenant % (_TENANTS - 1) if context.tenant else 0,
        0 if context.hour < 0 else 1 + int(context.hour % _HOURS) // _HOURS_A_CLASS,
    )
    return np.array(list(map(add, _FIRSTS, classes)), np.int32)


def stop_code(stop: str, clock: Clock) -> int:
    """The number of the feature "stop" alone."""
    return int(_STARTS["stop"]) + _known_stop(stop, clock)


def _stop_class(context: Context) -> int:
    return _RUNNING if context.stop is None else _known_stop(context.stop, context.clock)


def _known_stop(stop: str, clock: Clock) -> int:
    return _STOPS.get(stop, _OTHER_STOP) + (4 if clock == "end" else 0)
