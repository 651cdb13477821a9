"""Recorded traces as streams of turns."""

import io
import itertools
import json
import tomllib

import msgspec
import pytest

from kvtier.errors import TraceError
from kvtier.sim.read_trace import read_trace
from kvtier.sim.workload.fit import fit, to_toml
from kvtier.sim.workload.generate import Generator
from kvtier.sim.workload.profiles import CHAT
from kvtier.sim.workload.quantiles import Quantiles
from kvtier.sim.workload.recorded import recorded_turns
from kvtier.sim.workload.settings import Synthetic

AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"


def read(text):
    return list(recorded_turns(io.BytesIO(text)).turns)


@pytest.mark.parametrize("seed", range(5))
def test_fronts_of_a_stream_are_those_of_the_trace(rows_of, text_of, trace_of, seed):
    rows = rows_of(seed)
    trace = trace_of(rows)
    for row, turn in enumerate(read(text_of(rows))):
        shared = turn.shared_tokens // 16
        if turn.ref < 0:
            assert turn.shared_tokens == 0
            continue
        path, before = trace.path(row), trace.path(turn.ref)
        common = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(path, before, strict=False)))
        goes_on = turn.shared_tokens == trace.tokens_in[turn.ref] + trace.tokens_out[turn.ref]
        assert common == shared or (goes_on and common == trace.blocks[turn.ref])


def test_a_turn_that_goes_on_shares_the_output_before_it(text_of):
    rows = [
        [0, 1, 0, 40, 30, "u", "end_turn", 1.0, -1, 0, 2],
        [9, 1, 1, 100, 5, "u", "end_turn", 1.0, 0, 2, 6],
        [10, 2, 0, 100, 5, "u", "end_turn", 1.0, 0, 2, 6],
        [11, 1, 2, 60, 5, "u", "end_turn", 1.0, 0, 2, 3],
    ]
    assert [(t.ref, t.shared_tokens) for t in read(text_of(rows))] == [(-1, 0), (0, 70), (0, 32), (0, 32)]


def test_a_stream_gives_rows_before_it_has_read_the_rest(text_of):
    class Pipe:
        """Breaks when it is asked for more than the first two rows."""

        def __init__(self, text):
            lines = text.split(b"\n")
            self.parts = [b"\n".join(lines[:3]) + b"\n"]

        def read(self, count):
            assert self.parts, "the stream read ahead"
            return self.parts.pop()

    rows = [[i, 1, i, 40, 1, "u", "", -1, -1, 0, 2] for i in range(5)]
    stream = recorded_turns(Pipe(text_of(rows)))
    assert [turn.t_s for turn in itertools.islice(stream.turns, 2)] == [0.0, 1.0]


def test_azure_is_arrivals_and_lengths():
    text = AZURE + b"2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    first, second = read(text)
    assert (first.t_s, first.tokens_in, first.tokens_out, first.ref) == (0.0, 374, 44, -1)
    assert second.t_s == pytest.approx(4.314579, abs=1e-5)
    assert second.tokens_in == 396


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (AZURE, 1, "no request"),
        (AZURE + b"2023-11-16 18:15:46.68,374\n", 2, "was cut"),
        (AZURE + b"2023-11-16 18:15:46.68,374,-4\n", 2, "GeneratedTokens"),
        (AZURE + b"yesterday,374,4\n", 2, "TIMESTAMP"),
        (AZURE + b"2023-11-16 18:15:46,3,4\n2023-11-16 18:15:45,3,4\n", 3, "before"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens,Mood\n", 1, "unknown field 'Mood'"),
        (b"TIMESTAMP,ContextTokens\n", 1, "name each"),
        (b"", 0, "empty"),
        (b"[1, 2]\n", 1, "neither"),
    ],
)
def test_what_is_malformed_is_named_with_its_line(text, line, says):
    with pytest.raises(TraceError, match=says) as caught:
        read(text)
    assert caught.value.line == line


def test_a_trace_cut_in_a_line_and_a_negative_time_are_named(text_of):
    rows = [[i, 1, i, 40, 1, "u", "", -1, -1, 0, 2] for i in range(3)]
    with pytest.raises(TraceError) as caught:
        read(text_of(rows)[:-9])
    assert caught.value.line == 4
    rows[1][0] = -1
    with pytest.raises(TraceError, match="negative") as caught:
        read(text_of(rows))
    assert caught.value.line == 3


BURST = b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_burstgpt_has_sessions_and_durations():
    text = BURST + b"5,a,2.5,GPT-4,100,50,150,Conversation log\n6,b,1,GPT-4,0,0,0,Conversation log\n"
    text += b"60,a,1,GPT-4,170,10,180,Conversation log\n99,a,1,GPT-4,20,10,30,Conversation log\n"
    text += b"100,,3,ChatGPT,20,10,30,API log\n"
    found = read(text)
    assert [(t.conversation, t.turn, t.ref, t.shared_tokens) for t in found] == [
        (0, 0, -1, 0), (0, 1, 0, 150), (0, 2, -1, 0), (-1, -1, -1, 0)
    ]  # fmt: skip
    fitted = fit(found)
    assert fitted.waits.points[0][1] == 38.0 and fitted.waits.points[-1][1] == 52.5
    assert fitted.requests.points[-1][1] == 3.0
    assert fitted.without_end == 0


def test_a_fit_finds_what_a_load_was_drawn_from():
    settings = Synthetic(sessions_per_day=3000, profiles=(CHAT,))
    fitted = fit(Generator(settings, 1).turns())
    assert fitted.samples > 1000
    assert fitted.waits.share_below(600) == pytest.approx(0.8, abs=0.05)
    again = msgspec.convert(tomllib.loads(to_toml(fitted))["wait"], Quantiles)
    assert again.share_below(600) == pytest.approx(fitted.waits.share_below(600), abs=0.001)
    with pytest.raises(TraceError, match="goes on"):
        fit(read(AZURE + b"2023-11-16 18:15:46.68,374,4\n"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"5,a,2.5,GPT-4,100,50,150\n", "was cut"),
        (b"-5,a,2.5,GPT-4,100,50,150,log\n", "Timestamp"),
        (b"5,a,nan,GPT-4,100,50,150,log\n", "Elapsed"),
        (b"5,a,2,GPT-4,1e9,50,150,log\n", "Request tokens"),
    ],
)
def test_a_malformed_line_of_burstgpt_is_named(line, says):
    with pytest.raises(TraceError, match=says) as caught:
        read(BURST + line)
    assert caught.value.line == 2


def test_tenants_travel(text_of):
    header = {"format": "kvtrace/1", "fields": ["t", "in", "ref", "lcp", "n", "tenant"], "block_tokens": 16}
    text = "\n".join(json.dumps(line) for line in (header, [0, 20, -1, 0, 1, 5])).encode()
    assert read(text)[0].tenant == 5
    assert read_trace(io.BytesIO(text)).blocks.tolist() == [1]
