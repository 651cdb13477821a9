"""Small synthetic traces, the same for the same seed."""

import io
import json
import random

import pytest

from kvtier.sim.read_trace import read_trace

FIELDS = ["t", "sid", "turn", "in", "out", "kind", "stop", "dur", "ref", "lcp", "n"]
BLOCK_TOKENS = 16


def kvtrace(rows, **header):
    """Bytes of a plain kvtrace/1 file."""
    lines = [{"format": "kvtrace/1", "fields": FIELDS, "block_tokens": BLOCK_TOKENS, **header}, *rows]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def chat_rows(seed, requests=300, chats=12):
    """Conversations that grow, pause, branch and share a system prompt."""
    chance = random.Random(seed)
    rows, last, t_s = [], {}, 0.0
    for row in range(requests):
        t_s = round(t_s + chance.expovariate(1), 3)
        chat = min(int(chance.expovariate(0.3)), chats - 1) + (row // 100) * 3
        ref, turn = last.get(chat, (-1, -1))
        if ref == -1 and rows:
            ref, shared = 0, min(2, rows[0][10])
        elif ref == -1:
            shared = 0
        else:
            shared = rows[ref][10] - (chance.random() < 0.2) * chance.randrange(rows[ref][10] + 1)
        blocks = shared + chance.randrange(0 if shared else 1, 6)
        tokens = blocks * BLOCK_TOKENS + chance.randrange(BLOCK_TOKENS)
        stop = chance.choice(["tool_use", "end_turn", ""])
        dur = chance.choice([-1, 0.5, 3.0])
        rows.append([t_s, chat, turn + 1, tokens, chance.randrange(50), "u", stop, dur, ref, shared, blocks])
        last[chat] = (row, turn + 1)
    return rows


@pytest.fixture
def rows_of():
    return chat_rows


@pytest.fixture
def text_of():
    return kvtrace


@pytest.fixture
def trace_of():
    """Reads a trace from rows."""
    return lambda rows: read_trace(io.BytesIO(kvtrace(rows)))
