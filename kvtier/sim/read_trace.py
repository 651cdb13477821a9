"""Recorded traces: kvtrace/1 and Mooncake's JSONL, checked line by line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO, Final

from kvtier.errors import TraceError
from kvtier.policy.baselines.interfaces import Outcome
from kvtier.sim.chains import NONE
from kvtier.sim.text import lines
from kvtier.sim.trace import Row, Trace, TraceBuilder

KVTRACE: Final = "kvtrace/1"
FIELDS: Final = ("t", "sid", "turn", "in", "out", "kind", "stop", "dur", "ref", "lcp", "n", "tenant")
_NEEDED: Final = frozenset({"t", "in", "ref", "lcp", "n"})
_DEFAULTS: Final = {"sid": -1, "turn": -1, "out": 0, "kind": "", "stop": "", "dur": -1, "tenant": 0}
_KINDS: Final = ("u", "t", "")
MOONCAKE_FIELDS: Final = frozenset({"timestamp", "input_length", "output_length", "hash_ids"})
# The service that recorded these traces keyed 512 tokens at a time; the files do not say so themselves.
MOONCAKE_BLOCK_TOKENS: Final = 512
# Numbers of blocks and rows are int32.
_MOST_BLOCKS: Final = 2**31 - 2


def read_trace(source: BinaryIO) -> Trace:
    """Read a trace to its end. source: file, pipe or anything with `read`; zstd or plain.

    The format is told from the first line. Raises TraceError with the line for anything malformed.
    """
    numbered = lines(source)
    number, line = next(numbered, (0, ""))
    if not number:
        raise TraceError(0, "is empty")
    builder = TraceBuilder()
    trace = stream_trace(chain([(number, line)], numbered), builder)
    for _ in trace.rows:
        pass
    return builder.build(trace.name, trace.block_tokens)


@dataclass(frozen=True, slots=True)
class RowStream:
    """A trace whose rows are read, and added to the builder, as they are walked."""

    name: str
    block_tokens: int
    rows: Iterator[Row]


def stream_trace(numbered: Iterator[tuple[int, str]], builder: TraceBuilder) -> RowStream:
    """numbered: lines from the first one on, at least one. Raises TraceError, also while rows are walked."""
    number, line = next(numbered)
    first = _parsed(line, number)
    if isinstance(first, dict) and first.get("format") == KVTRACE:
        return _stream_kvtrace(first, number, numbered, builder)
    if isinstance(first, dict) and "hash_ids" in first:
        return RowStream("", MOONCAKE_BLOCK_TOKENS, _mooncake_rows(first, number, numbered, builder))
    raise TraceError(number, f"starts neither a {KVTRACE} trace nor a Mooncake trace")


def _stream_kvtrace(
    header: dict[str, Any], number: int, numbered: Iterator[tuple[int, str]], builder: TraceBuilder
) -> RowStream:
    fields = header.get("fields")
    if not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
        raise TraceError(number, "'fields' is no list of names")
    if unknown := [field for field in fields if field not in FIELDS]:
        raise TraceError(number, f"unknown field '{unknown[0]}'")
    if len(set(fields)) < len(fields) or not set(fields) >= _NEEDED:
        raise TraceError(number, f"'fields' must name each of {', '.join(sorted(_NEEDED))}, and none twice")
    block_tokens = _integer(header.get("block_tokens"), "block_tokens", number, least=1)
    rows = _kvtrace_rows(fields, block_tokens, number, numbered, builder)
    return RowStream(str(header.get("name", "")), block_tokens, rows)


def _kvtrace_rows(
    fields: list[str],
    block_tokens: int,
    number: int,
    numbered: Iterator[tuple[int, str]],
    builder: TraceBuilder,
) -> Iterator[Row]:
    last_s = 0.0
    for number, line in numbered:
        values = _parsed(line, number)
        if not isinstance(values, list) or len(values) != len(fields):
            raise TraceError(number, f"is no array of {len(fields)} values")
        row = _kvtrace_row(_DEFAULTS | dict(zip(fields, values, strict=True)), number, builder, block_tokens)
        last_s = _in_order(row.t_s, last_s, number)
        builder.add(row)
        yield row
    if not len(builder):
        raise TraceError(number, "is the last line, and there is no request")


def _kvtrace_row(value: dict[str, Any], number: int, builder: TraceBuilder, block_tokens: int) -> Row:
    def integer(name: str, least: int) -> int:
        return _integer(value[name], name, number, least=least)

    tokens_in, blocks, shared, ref = integer("in", 0), integer("n", 0), integer("lcp", 0), integer("ref", -1)
    if ref >= len(builder):
        raise TraceError(number, f"'ref' names row {ref}, which did not come before")
    if shared > (builder.blocks[ref] if ref >= 0 else 0):
        raise TraceError(number, f"'lcp' is {shared}, more than row {ref} has")
    if shared > blocks:
        raise TraceError(number, f"'lcp' is {shared}, more than 'n', {blocks}")
    if blocks * block_tokens > tokens_in:
        raise TraceError(number, f"{blocks} full blocks do not fit into {tokens_in} tokens")
    if value["kind"] not in _KINDS:
        raise TraceError(number, f"'kind' is none of {_KINDS}")
    if not isinstance(value["stop"], str):
        raise TraceError(number, "'stop' is no text")
    duration_s = _number(value["dur"], "dur", number)
    if duration_s < 0 and duration_s != -1:
        raise TraceError(number, "'dur' is negative and not -1")
    leaf = builder.chains.ancestor(builder.leaf[ref], shared - 1) if shared else NONE
    return Row(
        t_s=_number(value["t"], "t", number),
        conversation=integer("sid", -1),
        turn=integer("turn", -1),
        tokens_in=tokens_in,
        kind=value["kind"],
        outcome=Outcome(integer("out", 0), value["stop"], duration_s),
        leaf=_extended(builder, leaf, shared, blocks, number),
        blocks=blocks,
        tenant=integer("tenant", 0),
        ref=ref,
    )


def _mooncake_rows(
    first: dict[str, Any], number: int, numbered: Iterator[tuple[int, str]], builder: TraceBuilder
) -> Iterator[Row]:
    known: dict[tuple[int, int], int] = {}
    last_s = 0.0
    value: Any = first
    while True:
        row = _mooncake_row(value, number, builder, known)
        last_s = _in_order(row.t_s, last_s, number)
        builder.add(row)
        yield row
        number, line = next(numbered, (0, ""))
        if not number:
            return
        value = _parsed(line, number)


def _mooncake_row(value: Any, number: int, builder: TraceBuilder, known: dict[tuple[int, int], int]) -> Row:
    if not isinstance(value, dict):
        raise TraceError(number, "is no object")
    if odd := sorted(MOONCAKE_FIELDS.symmetric_difference(value)):
        raise TraceError(number, f"{'unknown' if odd[0] in value else 'no'} field '{odd[0]}'")
    tokens_in = _integer(value["input_length"], "input_length", number, least=0)
    hashes = value["hash_ids"]
    if not isinstance(hashes, list):
        raise TraceError(number, "'hash_ids' is no list")
    ids = [_integer(item, "hash_ids", number, least=0) for item in hashes]
    full = tokens_in // MOONCAKE_BLOCK_TOKENS
    if len(ids) < full:
        raise TraceError(number, f"'hash_ids' names {len(ids)} blocks, and the prompt has {full} full ones")
    leaf, shared = NONE, 0
    while shared < full and (found := known.get((leaf, ids[shared]))) is not None:
        leaf, shared = found, shared + 1
    start = builder.chains.blocks
    last = _extended(builder, leaf, shared, full, number)
    for block, item in enumerate(ids[shared:full], start):
        known[leaf, item] = block
        leaf = block
    outcome = Outcome(_integer(value["output_length"], "output_length", number, least=0), "", -1.0)
    t_s = _number(value["timestamp"], "timestamp", number) / 1000
    return Row(t_s, -1, -1, tokens_in, "", outcome, last, full)


def _extended(builder: TraceBuilder, leaf: int, shared: int, blocks: int, number: int) -> int:
    """Put the new blocks of a path of `blocks` on its known front; returns the last block."""
    if blocks == shared:
        return leaf
    if builder.chains.blocks + blocks - shared > _MOST_BLOCKS:
        raise TraceError(number, f"the trace has more than {_MOST_BLOCKS} blocks")
    return builder.chains.extend(leaf, shared, blocks - shared)


def _in_order(t_s: float, last_s: float, number: int) -> float:
    if t_s < 0:
        raise TraceError(number, f"the time {t_s} is negative")
    if t_s < last_s:
        raise TraceError(number, f"the time {t_s} lies before that of the row above, {last_s}")
    return t_s


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(number, f"is not JSON, or was cut: {error}") from error


def _checked(
    value: Any, kinds: tuple[type, ...], name: str, number: int, fits: Callable[[Any], bool], what: str
) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds) or not fits(value):
        raise TraceError(number, f"'{name}' is not {what}: {value!r:.40}")
    return value


def _integer(value: Any, name: str, number: int, *, least: int) -> int:
    def fits(item: int) -> bool:
        return least <= item < 2**62

    return int(_checked(value, (int,), name, number, fits, f"an integer of at least {least}"))


def _number(value: Any, name: str, number: int) -> float:
    def fits(item: float) -> bool:
        return abs(item) < 1e300 and math.isfinite(item)

    return float(_checked(value, (int, float), name, number, fits, "a number"))
