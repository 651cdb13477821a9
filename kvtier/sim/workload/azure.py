"""Azure's traces of 2023 and 2024: when requests came and how long they were, and nothing of what they share.

CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from kvtier.errors import TraceError
from kvtier.sim.workload.turns import Turn

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOST_TOKENS: Final = 1 << 31


def azure_turns(first: str, numbered: Iterator[tuple[int, str]]) -> Iterator[Turn]:
    """first: the line of column names; numbered: the lines after it. Raises TraceError with the line."""
    names = tuple(name.strip() for name in first.split(","))
    if odd := [name for name in names if name not in COLUMNS]:
        raise TraceError(1, f"unknown field '{odd[0]}'")
    if sorted(names) != sorted(COLUMNS):
        raise TraceError(1, f"does not name each of {', '.join(COLUMNS)} once")
    place = [names.index(name) for name in COLUMNS]
    start: datetime | None = None
    last_s = 0.0
    for number, line in numbered:
        values = next(csv.reader([line]))
        if len(values) != len(names):
            raise TraceError(number, f"has not {len(names)} values, or was cut")
        at = _time(values[place[0]], number)
        start = start or at
        t_s = (at - start).total_seconds()
        if t_s < last_s:
            raise TraceError(number, f"the time {values[place[0]]} lies before that of the row above")
        last_s = t_s
        tokens_in, tokens_out = (_count(values[place[i]], COLUMNS[i], number) for i in (1, 2))
        yield Turn(t_s, -1, 0, -1, tokens_in, tokens_out, "", "", -1.0, -1, 0)


def _time(text: str, number: int) -> datetime:
    """Seven digits of a second are more than a datetime holds."""
    whole, dot, part = text.partition(".")
    try:
        return datetime.fromisoformat(whole + dot + part[:6]) if dot else datetime.fromisoformat(whole)
    except ValueError as error:
        raise TraceError(number, f"'TIMESTAMP' is no time: {text!r:.40}") from error


def _count(text: str, name: str, number: int) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text) < _MOST_TOKENS:
        raise TraceError(number, f"'{name}' is no number of tokens: {text!r:.40}")
    return int(text)
