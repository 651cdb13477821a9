"""Bent traces are traces: what the benchmark of robustness replays is what its names say."""

import numpy as np
import pytest

from benchmarks.perturbations import CHANGES, chosen, generated, measured, together
from kvtier.sim.hitratio import sizes_of_blocks, unbounded_percent
from kvtier.sim.workload.profiles import CHAT


@pytest.fixture
def trace(trace_of, rows_of):
    return trace_of(rows_of(3))


def paths(trace):
    return [trace.path(row).tolist() for row in range(len(trace))]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_gives_a_trace(trace, change):
    bent = CHANGES[change](trace)
    assert len(bent) > 0
    assert np.all(np.diff(bent.t_s) >= 0)
    known = 0
    for path in paths(bent):
        parents = [-1, *path][: len(path)]
        assert [int(bent.parent[block]) for block in path] == parents
        fresh = [block for block in path if block >= known]
        assert fresh == list(range(known, known + len(fresh)))
        known += len(fresh)
    assert known == bent.unique_blocks
    assert np.all(bent.blocks * bent.block_tokens <= bent.tokens_in)


def test_all_rows_are_the_trace_itself(trace):
    same = chosen(trace, np.arange(len(trace)))
    assert paths(same) == paths(trace)
    assert same.parent.tolist() == trace.parent.tolist()


def test_coarser_blocks_are_the_full_ones(trace):
    coarse = chosen(trace, np.arange(len(trace)), 2)
    assert coarse.block_tokens == 2 * trace.block_tokens
    assert coarse.blocks.tolist() == (trace.blocks // 2).tolist()


def test_two_that_share_nothing_hit_as_one_does(trace):
    both = together(trace, trace)
    assert both.unique_blocks == 2 * trace.unique_blocks
    assert unbounded_percent(both) == pytest.approx(unbounded_percent(trace))
    assert len(set(both.conversation.tolist())) == 2 * len(set(trace.conversation.tolist()))


def test_a_line_says_what_was_reached():
    trace = generated((CHAT,), 200, 6.0)
    [size] = sizes_of_blocks(trace, [trace.unique_blocks // 10])
    line = measured("small", trace, size, "tokens", baselines=True, two_tiers=True)
    assert 0 < line.limit <= line.detail["clairvoyant"]
    assert line.value <= line.detail["clairvoyant"]
    assert line.detail["best_baseline"][1] > 0
    assert line.detail["two_tiers_cost"][1] <= 1.6
