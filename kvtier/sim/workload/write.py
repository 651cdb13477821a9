"""Turns as kvtrace/1."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator

from kvtier.sim.read_trace import FIELDS, KVTRACE
from kvtier.sim.workload.turns import TurnStream


def kvtrace_lines(stream: TurnStream) -> Iterator[str]:
    """The lines of a trace, as the turns come; memory holds two numbers a row.

    A path is the full blocks of a prompt, so `lcp` never names blocks of an output; that a row goes on from
    the output before it follows from its conversation and length.
    """
    size = stream.block_tokens
    header = {"format": KVTRACE, "fields": FIELDS, "name": stream.name, "block_tokens": size}
    yield _line(header)
    blocks = array("i")
    for turn in stream.turns:
        n = turn.tokens_in // size
        shared = min(turn.shared_tokens // size, n, blocks[turn.ref]) if turn.ref >= 0 else 0
        blocks.append(n)
        yield _line(
            [
                round(turn.t_s, 3),
                turn.conversation,
                turn.turn,
                turn.tokens_in,
                turn.tokens_out,
                turn.kind,
                turn.stop,
                round(turn.service_s, 3),
                turn.ref if shared else -1,
                shared,
                n,
                turn.tenant,
            ]
        )


def _line(value: object) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
