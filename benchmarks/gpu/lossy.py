"""What the lossy codecs cost on the device, and what they save: parks and restores of a conversation."""

from __future__ import annotations

import statistics
from dataclasses import replace

from benchmarks.gpu.copies import NAMES, gigabytes
from benchmarks.gpu.rig import Bench, Conversation, conversations, pool_over, start, with_checksums
from kvtier.bench.lines import Line
from kvtier.bench.link import DIRECTIONS
from kvtier.geometry import LOSSY
from kvtier.gpu.cuda.engine import CudaCopyEngine
from kvtier.gpu.pool import Pool
from kvtier.gpu.quantise import Values


def lossy(bench: Bench) -> list[Line]:
    """GB/s of KV, before it is encoded, through each codec and without one, in turn."""
    sizes, nbytes = bench.sizes, bench.sizes.conversation_bytes
    with (
        bench.arena(nbytes, sizes.tokens // sizes.block_tokens) as arena,
        bench.memory(2 * nbytes) as memory,
        bench.engine(arena, nbytes) as engine,
    ):
        bench.finite(memory)
        pool = pool_over(memory, sizes, False)
        layout = replace(pool.layout, values=Values("fp16", sizes.head_dim))
        what = conversations(Pool(layout, pool.device_memory), sizes, 1)[0]
        return [line for codec in LOSSY for line in _codec(bench, engine, what, layout.values, codec)]


def _codec(
    bench: Bench, engine: CudaCopyEngine, what: Conversation, values: Values | None, codec: str
) -> list[Line]:
    assert values is not None
    items = [replace(item, nbytes=values.encoded_bytes(item.nbytes)) for item in what.items]
    small = Conversation(what.binding, items, what.nbytes)
    sizes = bench.sizes
    lines = []
    for direction in DIRECTIONS:
        ratios, rates = [], []
        for turn in range(sizes.rounds + 1):
            # Each turn, since a lossy restore changes what is in the pages.
            sums = start(engine, "gather", what, sizes, verify=True).wait_checksums()
            exact = with_checksums(what, sums)
            plain = start(engine, direction, exact, sizes, verify=True).wait()
            job = start(engine, "gather", small, sizes, verify=True, fidelity=codec)
            sums = job.wait_checksums()
            own = job.ended_s - job.begun_s
            if direction == "scatter":
                back = with_checksums(small, sums)
                own = start(engine, direction, back, sizes, verify=True, fidelity=codec).wait()
            if turn:
                ratios.append(plain / own)
                rates.append(gigabytes(what.nbytes, own))
        lines.append(
            Line(
                f"{codec}, {NAMES[direction]}",
                statistics.median(rates),
                "GB/s of KV",
                ratio=round(statistics.median(ratios), 3),
                detail={"ratio_is": "how many times as fast as exact", "stored_bytes": items[0].nbytes},
            )
        )
    return lines
