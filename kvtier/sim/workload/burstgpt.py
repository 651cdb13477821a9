"""BurstGPT (Wang et al., arXiv 2401.17644, CC BY 4.0): 213 days of requests, in release 2 with sessions.

CSV with the columns Timestamp (seconds), Session ID, Elapsed time (seconds, to the complete answer), Model,
Request tokens, Response tokens, Total tokens, Log Type; release 1 has neither sessions nor elapsed times.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from typing import Final

from kvtier.errors import TraceError
from kvtier.sim.workload.turns import Turn

COLUMNS: Final = (
    "Timestamp", "Session ID", "Elapsed time", "Model", "Request tokens", "Response tokens", "Total tokens",
    "Log Type",
)  # fmt: skip
_NEEDED: Final = ("Timestamp", "Request tokens", "Response tokens")
_MOST_TOKENS: Final = 1 << 31


def burstgpt_turns(first: str, numbered: Iterator[tuple[int, str]]) -> Iterator[Turn]:
    """first: the line of column names; numbered: the lines after it. Raises TraceError with the line.

    Requests that failed, with no tokens in or out, are left out.  The files do not say what a session's
    requests share: one at least as long as the prompt and answer before it counts as going on from them.
    """
    names = next(csv.reader([first]))
    if odd := [name for name in names if name not in COLUMNS]:
        raise TraceError(1, f"unknown field '{odd[0]}'")
    if missing := [name for name in _NEEDED if names.count(name) != 1]:
        raise TraceError(1, f"does not name '{missing[0]}' once")
    # Session -> (number, row and stored tokens of its last request, turns).
    sessions: dict[str, tuple[int, int, int, int]] = {}
    last_s, row = 0.0, 0
    for number, line in numbered:
        values = next(csv.reader([line]))
        if len(values) != len(names):
            raise TraceError(number, f"has not {len(names)} values, or was cut")
        value = dict(zip(names, values, strict=True))
        t_s = _seconds(value, "Timestamp", number)
        if t_s < last_s:
            raise TraceError(number, f"the time {t_s} lies before that of the row above, {last_s}")
        last_s = t_s
        tokens_in, tokens_out = (_tokens(value, name, number) for name in _NEEDED[1:])
        if not tokens_in or not tokens_out:
            continue
        session = value.get("Session ID", "")
        name, ref, stored, turn = sessions.get(session, (len(sessions), -1, 0, 0))
        goes_on = bool(session) and ref >= 0 and tokens_in >= stored
        if session:
            sessions[session] = (name, row, tokens_in + tokens_out, turn + 1)
        yield Turn(
            t_s,
            name if session else -1,
            0,
            turn if session else -1,
            tokens_in,
            tokens_out,
            "u" if session else "",
            "",
            _seconds(value, "Elapsed time", number) if value.get("Elapsed time") else -1.0,
            ref if goes_on else -1,
            stored if goes_on else 0,
        )
        row += 1


def _seconds(value: Mapping[str, str], name: str, number: int) -> float:
    try:
        seconds = float(value[name])
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < 1e12:
        raise TraceError(number, f"'{name}' is no time: {value[name]!r:.40}")
    return seconds


def _tokens(value: Mapping[str, str], name: str, number: int) -> int:
    text = value[name].removesuffix(".0")
    if not text.isascii() or not text.isdecimal() or not int(text) < _MOST_TOKENS:
        raise TraceError(number, f"'{name}' is no number of tokens: {value[name]!r:.40}")
    return int(text)
