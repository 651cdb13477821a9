"""Recorded traces as streams of turns: kvtrace/1, Mooncake, Azure, BurstGPT."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

from kvtier.errors import TraceError
from kvtier.sim.chains import NONE
from kvtier.sim.read_trace import stream_trace
from kvtier.sim.text import lines
from kvtier.sim.trace import Row, TraceBuilder
from kvtier.sim.workload.azure import azure_turns
from kvtier.sim.workload.burstgpt import burstgpt_turns
from kvtier.sim.workload.turns import Turn, TurnStream

# These traces do not name blocks.
_CSV_BLOCK_TOKENS = 64


def recorded_turns(source: BinaryIO) -> TurnStream:
    """Read a trace as it comes. source: file or pipe, zstd or plain; the first line tells the format.

    Memory grows with the rows, not with the blocks. Raises TraceError with the line, also while it is read.
    """
    numbered = lines(source)
    number, first = next(numbered, (0, ""))
    if not number:
        raise TraceError(0, "is empty")
    first = first.lstrip("\ufeff")
    if first.startswith("TIMESTAMP"):
        return TurnStream("azure", _CSV_BLOCK_TOKENS, _not_empty(azure_turns(first, numbered)))
    if first.startswith("Timestamp"):
        return TurnStream("burstgpt", _CSV_BLOCK_TOKENS, _not_empty(burstgpt_turns(first, numbered)))
    builder = TraceBuilder()
    trace = stream_trace(chain([(number, first)], numbered), builder)
    return TurnStream(trace.name, trace.block_tokens, _turns(trace.rows, builder, trace.block_tokens))


def _turns(rows: Iterator[Row], builder: TraceBuilder, block_tokens: int) -> Iterator[Turn]:
    """Blocks are numbered as they appear, so the row that brought a block is found by its number."""
    first_blocks, brought_by = array("q"), array("q")
    tokens_in, tokens_out, conversations = array("q"), array("q"), array("q")
    before = 0
    for number, row in enumerate(rows):
        new = builder.chains.blocks - before
        before = builder.chains.blocks
        shared = row.blocks - new
        ref, shared_tokens = -1, shared * block_tokens
        if shared:
            end = builder.chains.ancestor(row.leaf, shared - 1)
            ref = _continued(number, row, shared, end, builder)
            if ref < 0:
                ref = brought_by[bisect_right(first_blocks, end) - 1]
            stored = tokens_in[ref] + tokens_out[ref]
            goes_on = conversations[ref] == row.conversation != -1 and builder.blocks[ref] == shared
            if goes_on and row.tokens_in >= stored:
                shared_tokens = stored
        if new:
            first_blocks.append(before - new)
            brought_by.append(number)
        for column, value in (
            (tokens_in, row.tokens_in),
            (tokens_out, row.outcome.tokens_out),
            (conversations, row.conversation),
        ):
            column.append(value)
        yield Turn(
            row.t_s,
            row.conversation,
            row.tenant,
            row.turn,
            row.tokens_in,
            row.outcome.tokens_out,
            row.kind,
            row.outcome.stop,
            row.outcome.duration_s,
            ref,
            shared_tokens,
        )


def _continued(number: int, row: Row, shared: int, end: int, builder: TraceBuilder) -> int:
    """The row that the trace itself names, where all of its path is the shared front; otherwise -1.

    A row that brought no block of its own may still have an output that this one goes on from.
    """
    ref = row.ref
    if 0 <= ref < number and builder.blocks[ref] == shared and builder.leaf[ref] == end != NONE:
        return ref
    return -1


def _not_empty(turns: Iterator[Turn]) -> Iterator[Turn]:
    first = next(turns, None)
    if first is None:
        raise TraceError(1, "is the last line, and there is no request")
    yield first
    yield from turns
