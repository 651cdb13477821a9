"""What the daemon's own eviction orders reach on recorded traces, one tier, in hits and in CPU time.

    python -m benchmarks.live_order TRACE... --shares 1,2,5
    python -m benchmarks.live_order TRACE --merge 32 --names new --policies cost

A JSON line for each trace, size and policy: token hits in percent; beside them hits weighted by cost (as in
`kvtier hitratio`) and the CPU time of deciding for each block that came in. `--merge N` makes one block of N.

The orders are told what a node tells them, in the same order. A request asks for what is stored of its path,
and uses it. When it ends, after its recorded duration (at once where that is unknown), the blocks that lack
are stored one by one, each with a search for victims of its own where the tier is full; its own blocks are
held meanwhile. Then the conversation waits. A path longer than the tier is cut to its front.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import numpy as np

from benchmarks.perturbations import chosen
from kvtier.bench.lines import Line
from kvtier.policy.defaults import make_policies
from kvtier.policy.usage import Name, ParkedBlock, Turn
from kvtier.sim.hitratio import Size, sizes_of_shares
from kvtier.sim.read_trace import read_trace
from kvtier.sim.replay import Score, score
from kvtier.sim.trace import Trace

# KV of a token of Llama 3.1 8B in bf16.
_TOKEN_BYTES: Final = 131072
_ROOT: Final = b"root"
# Of conversations: as recorded, a new one for each request, one for everybody.
Names: TypeAlias = Literal["trace", "new", "one"]


class LiveTier:
    """Host memory without a disk, of `capacity` blocks, ordered by a policy of the daemon.

    came_in: blocks that were stored.  cpu_s: of this thread, spent in all calls.
    """

    def __init__(self, policy: str, capacity: int, block_tokens: int) -> None:
        self._policies = make_policies(policy, "cost")
        self._capacity = capacity
        self._block_tokens = block_tokens
        self._resident: dict[bytes, None] = {}
        self.came_in = 0
        self.cpu_s = 0.0

    def ask(self, name: Name, path: list[bytes], tokens: int, now_s: float) -> int:
        """A request comes: how many blocks of its path are there, from the root on."""
        begun = time.thread_time()
        usage, order = self._policies.usage, self._policies.host
        usage.passed(now_s, False, 0)
        usage.asked(name, tokens, now_s)
        hit = 0
        while hit < len(path) and path[hit] in self._resident:
            order.used(path[hit], now_s)
            hit += 1
        self.cpu_s += time.thread_time() - begun
        return hit

    def park(self, name: Name, path: list[bytes], end: int, stop: str, now_s: float) -> None:
        """It ended: prompt and output, `end` tokens, of which the path is stored."""
        begun = time.thread_time()
        usage, order = self._policies.usage, self._policies.host
        usage.passed(now_s, False, 0)
        kept = path[: self._capacity]
        own = dict.fromkeys(kept)
        for parent, key in zip([_ROOT, *kept], kept, strict=False):
            if key in self._resident:
                order.used(key, now_s)
                continue
            if len(self._resident) >= self._capacity:
                self._evict_one(own, now_s)
            order.added(key, parent, self._block_tokens * _TOKEN_BYTES, now_s)
            self._resident[key] = None
            self.came_in += 1
        usage.parked(name, self._chain(path, end), Turn(stop), now_s)
        self.cpu_s += time.thread_time() - begun

    def _evict_one(self, own: dict[bytes, None], now_s: float) -> None:
        for victim in self._policies.host.victims(now_s):
            if victim not in own:
                self._policies.host.removed(victim)
                del self._resident[victim]
                return

    def _chain(self, path: list[bytes], end: int) -> Iterator[ParkedBlock]:
        """A trace does not say which blocks hold an output: it counts with the last one."""
        size = self._block_tokens
        for number, key in enumerate(path):
            start = number * size
            last = max(end, start + size) if number + 1 == len(path) else start + size
            yield ParkedBlock(key, start, last, (last - start) * _TOKEN_BYTES)


def live_replay(trace: Trace, tier: LiveTier, *, names: Names = "trace") -> Score:
    """Serve every request. names: those of the trace, a new one for each request, or one for all."""
    hits = np.zeros(len(trace), np.int64)
    running: list[tuple[float, int, Name, list[bytes]]] = []

    def end_until(now_s: float) -> None:
        while running and running[0][0] <= now_s:
            end_s, row, name, path = heapq.heappop(running)
            tokens = int(trace.tokens_in[row]) + max(int(trace.tokens_out[row]), 0)
            tier.park(name, path, tokens, trace.stop[row], end_s)

    for row in range(len(trace)):
        now_s, conversation = float(trace.t_s[row]), int(trace.conversation[row])
        end_until(now_s)
        name = (str(trace.tenant[row]), _conversation(names, row, conversation))
        path = [block.to_bytes(8, "big") for block in trace.path(row).tolist()]
        hits[row] = tier.ask(name, path, int(trace.tokens_in[row]), now_s)
        heapq.heappush(running, (now_s + max(float(trace.duration_s[row]), 0.0), row, name, path))
    end_until(float("inf"))
    return score(trace, hits)


def _conversation(names: Names, row: int, conversation: int) -> str:
    if names == "one":
        return "everybody"
    return f"request {row}" if names == "new" or conversation < 0 else str(conversation)


def measured(trace: Trace, policy: str, size: Size, *, names: Names = "trace") -> Line:
    """One policy at one size."""
    tier = LiveTier(policy, size.blocks, trace.block_tokens)
    found = live_replay(trace, tier, names=names)
    detail = {
        "policy": policy,
        "share_percent": size.share_percent,
        "capacity_blocks": size.blocks,
        "block_tokens": trace.block_tokens,
        "names": names,
        "token_hit_percent": round(found.token_hit_percent, 2),
        "cost_hit_percent": round(found.cost_hit_percent, 2),
        "cpu_us_per_block": round(1e6 * tier.cpu_s / max(tier.came_in, 1), 1),
        "blocks_in": tier.came_in,
    }
    name = f"live order: {trace.name}, {size.share_percent:g} %, {policy}"
    return Line(name, round(found.token_hit_percent, 2), "% of tokens", detail=detail)


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--shares", default="1,2,5", help="sizes, in percent of a trace's unique blocks")
    parser.add_argument("--merge", type=int, default=1, help="blocks of the trace that make one block")
    parser.add_argument("--policies", default="lru,cost")
    parser.add_argument("--names", choices=get_args(Names), default="trace", help="of conversations")
    options = parser.parse_args()
    for path in options.traces:
        with path.open("rb") as file:
            trace = read_trace(file)
        trace = replace(trace, name=trace.name or path.name)
        if options.merge > 1:
            trace = chosen(trace, np.arange(len(trace)), options.merge)
        for size in sizes_of_shares(trace, [float(share) for share in options.shares.split(",")]):
            for policy in options.policies.split(","):
                line = measured(trace, policy, size, names=options.names)
                print(line.json(), flush=True)


if __name__ == "__main__":
    main()
