"""Tokens for chains of which only lengths are known: equal where chains share blocks, different elsewhere."""

from __future__ import annotations

import numpy as np

from kvtier.sim.cluster.job import Job

# Of token ids; runs are far enough apart in it that two of them never have the same text.
_STEP = 2654435761


def packed_text(job: Job, tokens: int) -> bytes:
    """The first `tokens` tokens of a job's prompt and output, packed as `kvtier.keys.pack_tokens` does.

    What is not a full block belongs to the row alone.
    """
    text = np.full(tokens, job.row, np.uint32)
    run, end = job.last, tokens
    while run is not None:
        if run.start < end:
            stop = min(run.end, end)
            # A branch may begin inside of its parent.
            ids = np.arange(run.start, stop, dtype=np.uint64) + np.uint64(run.number * _STEP & 0xFFFFFFFF)
            text[run.start : stop] = (ids & 0x7FFFFFFF).astype(np.uint32)
            end = run.start
        run = run.parent
    return text.tobytes()
