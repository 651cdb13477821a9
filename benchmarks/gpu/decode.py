"""What decode-like work, matrix products and attention reads, loses while parks and restores run."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.rig import Bench, conversations, pool_over, start
from kvtier.bench.lines import Line
from kvtier.gpu.engine import Direction

ATTENTION_TOKENS = 4096
BATCH = 16
MODES: dict[str, tuple[Direction, ...]] = {
    "park": ("gather",),
    "restore": ("scatter",),
    "park and restore": ("gather", "scatter"),
}


class Decode:
    """One step: the products of some layers for a batch of tokens, and a read of their KV."""

    def __init__(self, bench: Bench) -> None:
        import torch  # here so that the other parts run without it

        sizes = bench.sizes
        where = "cpu" if bench.dry else "cuda"
        kind = torch.float32 if bench.dry else torch.bfloat16
        tokens = 64 if bench.dry else ATTENTION_TOKENS
        self._torch: Any = torch
        self._gpu = not bench.dry
        make: dict[str, Any] = {"device": where, "dtype": kind}
        self._x = torch.randn(BATCH, sizes.hidden, **make)
        count = 2 if bench.dry else 8
        self._up = [torch.randn(sizes.hidden, sizes.inner, **make) * 0.01 for _ in range(count)]
        self._down = [torch.randn(sizes.inner, sizes.hidden, **make) * 0.01 for _ in range(count)]
        self._q = torch.randn(BATCH, sizes.kv_heads, 4, sizes.head_dim, **make)
        self._kv = [
            torch.randn(2, BATCH, sizes.kv_heads, tokens, sizes.head_dim, **make) for _ in range(count)
        ]
        self._graph: Any = None

    def eager(self) -> None:
        """A step whose kernels Python queues one by one."""
        x = self._x
        for up, down, kv in zip(self._up, self._down, self._kv, strict=True):
            x = (x @ up) @ down
            self._torch.nn.functional.scaled_dot_product_attention(self._q, kv[0], kv[1])

    def capture(self) -> Callable[[], None]:
        """The step as a CUDA graph: what engines replay, and what Python's speed does not touch."""
        if not self._gpu:
            return self.eager
        warm = self._torch.cuda.Stream()
        with self._torch.cuda.stream(warm):
            for _ in range(3):
                self.eager()
        warm.synchronize()
        self._graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(self._graph):
            self.eager()
        replay: Callable[[], None] = self._graph.replay
        return replay

    def steps_per_s(self, step: Callable[[], None], seconds: float) -> float:
        """Steps in a second, each waited for."""
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            step()
            if self._gpu:
                self._torch.cuda.current_stream().synchronize()
            count += 1
        return count / (time.perf_counter() - begun)


def interference(bench: Bench) -> list[Line]:
    """Steps a second alone and while copies run flat out, in turn."""
    sizes = bench.sizes
    nbytes = sizes.conversation_bytes
    blocks = 2 * (sizes.tokens // sizes.block_tokens)
    decode = Decode(bench)
    lines = []
    with (
        bench.arena(2 * nbytes, blocks) as arena,
        bench.memory(2 * nbytes) as memory,
        bench.engine(arena, 2 * nbytes) as engine,
    ):
        pair = conversations(pool_over(memory, sizes, False), sizes)

        def flat_out(directions: tuple[Direction, ...], stop: threading.Event) -> list[threading.Thread]:
            def copy(direction: Direction, n: int) -> None:
                while not stop.is_set():
                    start(engine, direction, pair[n], sizes).wait()

            made = [threading.Thread(target=copy, args=(d, n)) for n, d in enumerate(directions)]
            for thread in made:
                thread.start()
            return made

        for kind, step in (("graph", decode.capture()), ("eager", decode.eager)):
            decode.steps_per_s(step, sizes.seconds / 4)
            for name, directions in MODES.items():
                losses, alone = [], []
                for _ in range(2 if not bench.dry else 1):
                    free = decode.steps_per_s(step, sizes.seconds / 2)
                    stop = threading.Event()
                    threads = flat_out(directions, stop)
                    busy = decode.steps_per_s(step, sizes.seconds / 2)
                    stop.set()
                    for thread in threads:
                        thread.join()
                    losses.append((1 - busy / free) * 100)
                    alone.append(free)
                lines.append(
                    Line(
                        f"decode-like work ({kind}) loses while {name} runs",
                        round(statistics.median(losses), 2),
                        "%",
                        5.0,
                        detail={"steps_s_alone": round(statistics.median(alone), 1)},
                    )
                )
    return lines
