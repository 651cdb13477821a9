"""Reading recorded traces: numbering, formats, pipes, and what is refused."""

import io
import json
import os
import threading

import numpy as np
import pytest
import zstandard

from kvtier.errors import TraceError
from kvtier.sim.read_trace import FIELDS, MOONCAKE_BLOCK_TOKENS, read_trace


def naive_paths(rows):
    """Paths by copying lists: a block is a new number when it first comes up."""
    paths, count = [], 0
    for *_, ref, shared, blocks in rows:
        new = list(range(count, count + blocks - shared))
        count += len(new)
        paths.append((paths[ref][:shared] if ref >= 0 else []) + new)
    return paths, count


@pytest.mark.parametrize("seed", range(5))
def test_paths_are_those_of_the_rows(rows_of, trace_of, seed):
    rows = rows_of(seed)
    trace = trace_of(rows)
    paths, count = naive_paths(rows)
    assert trace.unique_blocks == count
    assert [trace.path(row).tolist() for row in range(len(trace))] == paths
    assert trace.tokens_in.tolist() == [row[3] for row in rows]
    assert trace.outcome(3).stop == rows[3][6]
    assert trace.outcome(3).duration_s == rows[3][7]


def test_blocks_are_numbered_in_order_of_first_appearance(rows_of, trace_of):
    trace = trace_of(rows_of(1))
    seen = np.concatenate([trace.path(row) for row in range(len(trace))])
    _, first = np.unique(seen, return_index=True)
    assert (np.diff(first) > 0).all()


def test_zstd_frames_and_plain_text_are_the_same(rows_of, text_of):
    text = text_of(rows_of(2))
    half = len(text) // 2
    frames = b"".join(zstandard.ZstdCompressor().compress(part) for part in (text[:half], text[half:]))
    plain, packed = read_trace(io.BytesIO(text)), read_trace(io.BytesIO(frames))
    assert (plain.leaf == packed.leaf).all()
    assert (plain.parent == packed.parent).all()


def test_a_pipe_is_read(rows_of, text_of):
    packed = zstandard.ZstdCompressor().compress(text_of(rows_of(2)))
    reader, writer = os.pipe()

    def feed():
        with open(writer, "wb") as file:
            file.write(packed)

    thread = threading.Thread(target=feed)
    thread.start()
    with open(reader, "rb") as file:
        assert len(read_trace(file)) == 300
    thread.join()


def mooncake(rows):
    paths, _ = naive_paths(rows)
    return "".join(
        json.dumps(
            {
                "timestamp": int(row[0] * 1000),
                "input_length": len(path) * MOONCAKE_BLOCK_TOKENS + 7,
                "output_length": row[4],
                "hash_ids": [*(1000 + block for block in path), 10**6 + number],
            }
        )
        + "\n"
        for number, (row, path) in enumerate(zip(rows, paths, strict=True))
    ).encode()


def test_mooncake_gives_the_same_forest_and_leaves_the_partial_block_out(rows_of, trace_of):
    rows = rows_of(4)
    trace, other = trace_of(rows), read_trace(io.BytesIO(mooncake(rows)))
    assert other.block_tokens == MOONCAKE_BLOCK_TOKENS
    assert (trace.parent == other.parent).all()
    assert (trace.leaf == other.leaf).all()
    assert other.t_s[5] == int(rows[5][0] * 1000) / 1000


def test_one_hash_on_two_parents_is_two_blocks():
    line = {"timestamp": 0, "input_length": 1024, "output_length": 1}
    text = "\n".join(json.dumps({**line, "hash_ids": ids}) for ids in ([1, 9], [2, 9]))
    assert read_trace(io.BytesIO(text.encode())).unique_blocks == 4


GOOD = [1.0, 0, 0, 40, 5, "u", "", 1.0, -1, 0, 2]


def changed(**values):
    row = list(GOOD)
    for name, value in values.items():
        row[FIELDS.index(name.rstrip("_"))] = value
    return row


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (changed(t=-1.0), "negative"),
        (changed(t=0.5), "before"),
        (changed(t=float("nan")), "'t' is not a number"),
        (changed(t=True), "'t' is not a number"),
        (changed(in_=-3), "'in'"),
        (changed(in_="7"), "'in'"),
        (changed(out=1.5), "'out'"),
        (changed(dur=-2), "'dur'"),
        (changed(kind="x"), "'kind'"),
        (changed(stop=3), "'stop'"),
        (changed(ref=1), "'ref'"),
        (changed(ref=-2), "'ref'"),
        (changed(lcp=1), "'lcp'"),
        (changed(ref=0, lcp=3, n=3, in_=99), "'lcp'"),
        (changed(ref=0, lcp=2, n=1), "'lcp'"),
        (changed(n=3), "do not fit"),
        (changed(n=-1), "'n'"),
        (GOOD[:-1], "no array of 11"),
        ({"t": 1}, "no array of 11"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(text_of, bad, says):
    with pytest.raises(TraceError, match=says) as caught:
        read_trace(io.BytesIO(text_of([GOOD, bad, GOOD])))
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"", 0),
        (b"\n\n", 0),
        (b"{}\n", 1),
        (b"\xff\n", 1),
        (b'{"format": "kvtrace/1", "fields": ["t"], "block_tokens": 4}\n', 1),
        (b'{"format": "kvtrace/1", "fields": ["t", "colour"], "block_tokens": 4}\n', 1),
        (b'{"format": "kvtrace/1", "fields": ["t", "in", "ref", "lcp", "n"], "block_tokens": 0}\n', 1),
        (b'{"format": "kvtrace/1", "fields": ["t", "in", "ref", "lcp", "n"], "block_tokens": 4}\n', 1),
        (b'{"format": "kvtrace/1", "fields": ["t", "in", "ref", "lcp", "n"], "block_tokens": 4}\n[0, 1', 2),
        (b'{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": []}\n', 1),
        (b'{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [], "x": 1}\n', 1),
        (b'{"timestamp": 0, "input_length": 5, "hash_ids": []}\n', 1),
    ],
)
def test_a_file_that_is_no_trace_is_refused(text, line):
    with pytest.raises(TraceError) as caught:
        read_trace(io.BytesIO(text))
    assert caught.value.line == line


@pytest.mark.parametrize("cut", [5, 60, 200])
def test_a_compressed_trace_that_was_cut_is_refused(rows_of, text_of, cut):
    packed = zstandard.ZstdCompressor().compress(text_of(rows_of(2)))
    with pytest.raises(TraceError):
        read_trace(io.BytesIO(packed[:-cut]))
